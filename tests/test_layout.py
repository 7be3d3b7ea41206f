"""The structure that the interfaces module draws: imports, packaged folders, lazy exports, doctests."""

from __future__ import annotations

import ast
import doctest
import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LEAVES = {"errors", "files", "interfaces", "planes", "views"}
KERNEL = LEAVES | {"precision", "tensors", "kernel"}
# module or package of celo_nnx -> what it may import of celo_nnx
ALLOWED = {
    "errors": set(),
    "files": {"errors"},
    "views": set(),
    "interfaces": {"views"},
    "planes": set(),
    "precision": LEAVES,
    "tensors": LEAVES,
    "kernel": LEAVES | {"precision"},
    "unrolled": set(),
    "tiling": {"unrolled"},
    "pallas_kernel": LEAVES | {"kernel", "tiling", "unrolled"},
    "groups": LEAVES | {"kernel", "pallas_kernel", "precision"},
    "sharding": KERNEL | {"groups"},
    "transform": LEAVES | {"sharding", "tensors"},
    "settings": KERNEL | {"sharding"},
    "optimizer": KERNEL | {"groups", "pallas_kernel", "settings", "sharding", "transform"},
    "work": set(),
    "model_shapes": {"errors", "tensors"},
    "plan": {"config", "devices", "errors", "model_shapes", "sharding", "tensors", "work"},
    "weights": {"errors", "files"},
    "drop_in": LEAVES | {"config", "optimizer", "weights"},
    "components": LEAVES,
    "experiments": {"config"},
    "processes": {"errors"},
    "devices": {"errors", "processes"},
    "meta": LEAVES | {"devices", "processes"},
    "tasks": LEAVES,
    "evaluation": LEAVES
    | {
        "build",
        "config",
        "devices",
        "experiments",
        "files",
        "lock",
        "meta",
        "optimizer",
        "tasks",
        "theta_io",
        "weights",
    },
    "series": set(),
    "doctor": {"errors", "devices", "meta", "replay"},
    "lock": {"errors"},
    "run_folder": LEAVES | {"lock", "meta"},
    "watch": LEAVES | {"meta", "run_folder", "series"},
    "run_report": LEAVES
    | {
        "build",
        "config",
        "description",
        "diagram",
        "evaluation",
        "meta",
        "run_files",
        "run_folder",
        "series",
        "theta_io",
    },
    "grids": LEAVES
    | {
        "config",
        "devices",
        "evaluation",
        "experiments",
        "lock",
        "meta",
        "phases",
        "run_files",
        "run_folder",
        "series",
        "theta_io",
        "training",
    },
    "explain": LEAVES
    | {"build", "config", "description", "evaluation", "optimizer", "tasks", "tensors", "weights"},
    "cards": LEAVES
    | {"evaluation", "meta", "phases", "run_files", "run_folder", "run_report", "theta_io", "weights"},
    "verify": LEAVES | {"devices", "meta", "run_folder", "theta_io", "training", "weights"},
    "phases": LEAVES | {"config"},
    "run_files": LEAVES | {"lock", "meta", "phases", "processes", "run_folder"},
    "theta_io": LEAVES | {"meta", "weights"},
    "build": LEAVES | {"components", "optimizer", "precision", "settings", "tensors", "theta_io"},
    "description": LEAVES | {"build", "optimizer", "settings", "tensors"},
    "diagram": LEAVES | {"description", "optimizer"},
    "dead": LEAVES | {"optimizer", "settings", "tensors"},
    "model_file": LEAVES | {"optimizer"},
    "compiled": set(),
    "pretrained": LEAVES | {"build", "config", "meta", "theta_io"},
    "bench_orthogonalization": LEAVES | {"components"},
    "bench_seeds": LEAVES | {"bench", "build", "devices", "meta", "pretrained", "processes"},
    "naive": LEAVES | {"naive_meta", "naive_zoo"},
    "naive_zoo": LEAVES,
    "naive_variants": LEAVES | {"config", "naive", "naive_zoo"},
    "recordings": LEAVES | {"naive", "naive_zoo", "pretrained", "build", "config"},
    "naive_meta": LEAVES | {"naive"},
}

# Examples: they use the package as a user's program does, and nothing uses them.
PROGRAMS = "experiments.training"


def modules() -> dict[str, Path]:
    """Returns dotted name -> file of every module of the package, components and experiments included."""
    found = {}
    for top, prefix in (
        (ROOT / "celo_nnx", ""),
        (ROOT / "components", "components."),
        (ROOT / "experiments", "experiments."),
    ):
        for path in top.rglob("*.py"):
            parts = path.relative_to(top).with_suffix("").parts
            if prefix == "" and parts[0] in ("components", "experiments"):
                continue  # the same files through the symlink
            name = prefix + ".".join(p for p in parts if p != "__init__")
            found[name.rstrip(".") or "__init__"] = path
    return found


def imports(path: Path) -> set[str]:
    """Returns the dotted names below celo_nnx that a file imports, inside functions too."""
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name.removeprefix("celo_nnx.") for a in node.names if a.name.startswith("celo_nnx.")}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "celo_nnx":
            module = node.module.removeprefix("celo_nnx").lstrip(".")
            out |= {module} if module else {a.name for a in node.names}
    return out


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_follow_the_arrows(name: str) -> None:
    top = name.split(".")[0]
    if name.startswith(PROGRAMS):
        return
    assert not any(i.startswith(PROGRAMS) for i in imports(modules()[name])), f"{name} imports an example"
    if top not in ALLOWED:
        return
    used = {i.split(".")[0] for i in imports(modules()[name])} - {top}
    assert used <= ALLOWED[top], f"{name} imports {used - ALLOWED[top]}"


def test_kinds_of_parts_do_not_import_each_other() -> None:
    for name, path in modules().items():
        if name.startswith("components."):
            kind = name.split(".")[1]
            others = {i.split(".")[1] for i in imports(path) if i.startswith("components.")} - {kind}
            assert not others, f"{name} imports {others}"


def test_every_package_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    on_disk = {"celo_nnx"}
    for name, path in modules().items():
        if path.name == "__init__.py" and name != "__init__":
            on_disk.add(f"celo_nnx.{name}")
    assert listed == on_disk


def test_modules_stay_short() -> None:
    for name, path in modules().items():
        assert len(path.read_text().splitlines()) <= 500, name


def test_import_is_lazy() -> None:
    code = "import sys, celo_nnx, celo_nnx.cli; print('jax' in sys.modules, 'flax' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["False", "False"]


def test_exports_exist() -> None:
    import celo_nnx

    for name in celo_nnx.__all__:
        assert getattr(celo_nnx, name) is not None


@pytest.mark.parametrize("name", sorted(modules()))
def test_examples_in_docstrings(name: str) -> None:
    if name == "__main__":
        return
    module = importlib.import_module("celo_nnx" if name == "__init__" else f"celo_nnx.{name}")
    result = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert result.failed == 0
