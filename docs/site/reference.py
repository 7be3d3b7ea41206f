"""The reference's pages, made from what is in the package: a module with a public name cannot be left out."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = "celo_nnx.experiments"  # presets, suites, grids: shown as tables by what they ask

# Page -> (title, its modules); every other module goes to the page of its package, or to INTERNALS.
PAGES = {
    "use": ("Use an optimizer", ("drop_in", "optimizer", "transform", "theta_io", "weights", "errors")),
    "assemble": (
        "Assemble a variant",
        ("interfaces", "views", "config", "build", "description", "diagram", "dead", "model_file", "listing"),
    ),
    "train": (
        "Meta-training runs",
        ("training", "phases", "run_folder", "run_files", "run_report", "watch", "verify", "cards"),
    ),
}
PACKAGES = {
    "meta": "Meta-training",
    "meta.estimators": "Estimators of the meta-gradient",
    "meta.augmentations": "Augmentations",
    "tasks": "Tasks and data",
    "evaluation": "Evaluation",
    "grids": "Ablation grids",
    "pretrained": "Published weights",
}
INTERNALS = "internals"


def modules() -> dict[str, Path]:
    """Returns dotted name -> file of every module with a public name or docstring, configs left out."""
    found = {}
    for top, prefix in ((ROOT / "celo_nnx", "celo_nnx"), (ROOT / "components", "celo_nnx.components")):
        for path in sorted(top.rglob("*.py")):
            parts = path.relative_to(top).with_suffix("").parts
            if top.name == "celo_nnx" and parts[0] in ("components", "experiments"):
                continue  # the same files through the symlinks
            if not parts[-1].startswith("_") or parts[-1] == "__init__":
                found[".".join((prefix, *(p for p in parts if p != "__init__")))] = path
    return found


def public_names(path: Path) -> list[str]:
    """Returns the names that a module defines for others: functions, classes, constants.

    Example:
      >>> "UserError" in public_names(ROOT / "celo_nnx" / "errors.py")
      True
    """
    names = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.append(node.target.id)
    return [name for name in names if not name.startswith("_")]


def page_of(module: str) -> str:
    """Returns the page that a module's names are on.

    Example:
      >>> page_of("celo_nnx.optimizer"), page_of("celo_nnx.components.features.plain")
      ('use', 'components.features')
    """
    name = module.removeprefix("celo_nnx").lstrip(".")
    for page, (_, members) in PAGES.items():
        if name in members:
            return page
    if name.startswith("components"):
        return ".".join(name.split(".")[:2])
    fitting = [package for package in PACKAGES if name == package or name.startswith(package + ".")]
    return max(fitting, key=len, default=INTERNALS)


def _title(page: str) -> str:
    if page in PAGES:
        return PAGES[page][0]
    if page.startswith("components"):
        kind = page.partition(".")[2]
        return f"Parts: {kind.replace('_', ' ')}" if kind else "Parts"
    return PACKAGES.get(page, "Everything else")


def pages() -> dict[str, str]:
    """Returns the Markdown of every reference page by file name, with a directive for each module."""
    by_page: dict[str, list[str]] = {}
    for module, path in modules().items():
        if module != "celo_nnx" and (public_names(path) or ast.get_docstring(ast.parse(path.read_text()))):
            by_page.setdefault(page_of(module), []).append(module)
    order = [*PAGES, *sorted(p for p in by_page if p.startswith("components")), *PACKAGES, INTERNALS]
    made = {}
    for page in order:
        if page in PAGES:
            names = [f"celo_nnx.{name}" for name in PAGES[page][1]]
        else:
            names = sorted(by_page.get(page, ()), key=lambda name: (name.count("."), name))
        blocks = [f"::: {name}\n    options:\n      heading_level: 2\n" for name in names]
        made[f"{page}.md"] = "\n".join([f"# {_title(page)}\n", *blocks])
    return made
