"""Files are data. A search of all modules for what would run or unpickle them, with few exceptions and why.

``tests/test_hostile_files.py`` tries.
"""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    path
    for top in ("celo_nnx", "components", "experiments")
    for path in (ROOT / top).rglob("*.py")
    if not any(parent.is_symlink() for parent in path.parents)
)
# (module, what it uses) -> why that runs no file that somebody else may have made
ALLOWED = {
    ("celo_nnx/__init__.py", "import_module"): "the package's own modules, by the names of a table in it",
    ("celo_nnx/meta/__init__.py", "import_module"): "as above",
    ("celo_nnx/config.py", "import_module"): "the package's own presets, by names found in its folder",
    ("celo_nnx/config.py", "spec_from_file_location"): "a file that the user names as config or optimizer",
    ("celo_nnx/config.py", "module_from_spec"): "as above",
    ("celo_nnx/config.py", "exec_module"): "as above",
    ("celo_nnx/evaluation/suites.py", "import_module"): "the package's own suites",
    ("celo_nnx/grids/grid_file.py", "import_module"): "the package's own grids",
    ("celo_nnx/build.py", "entry_points().load"): "parts of packages that the user has installed",
}
LIBRARIES = {
    "pickle", "_pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "dbm", "joblib", "torch",
    "yaml", "runpy", "code", "codeop", "imp", "pandas", "xmlrpc", "jsonpickle", "tarfile",
}  # fmt: skip
NAMES = {"eval", "exec", "compile", "__import__"}
ATTRIBUTES = {
    "import_module", "spec_from_file_location", "module_from_spec", "exec_module", "load_module", "run_path",
    "system", "popen", "extract", "extractall", "unpack_archive", "read_pickle", "from_serialized_dict",
    "deserialize_and_load",
}  # fmt: skip


def uses(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yields (line, what) of everything in a module that could run or unpickle a file."""
    points = any("entry_points" in ast.dump(node) for node in ast.walk(tree) if isinstance(node, ast.Call))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, a.name) for a in node.names if a.name.split(".")[0] in LIBRARIES)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").split(".")[0] in LIBRARIES:
                yield node.lineno, node.module or ""
            yield from ((node.lineno, a.name) for a in node.names if a.name in ATTRIBUTES | {"load_module"})
        elif isinstance(node, ast.Name) and node.id in NAMES | {"__builtins__"}:
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and node.attr in ATTRIBUTES:
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call):
            yield from ((node.lineno, what) for what in called(node, points))


def called(node: ast.Call, points: bool) -> Iterator[str]:
    """Yields what is wrong with a call's arguments."""
    words = {word.arg: word.value for word in node.keywords}
    function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""

    def says(name: str, value: bool) -> bool:
        return isinstance(words.get(name), ast.Constant) and words[name].value is value

    if function == "load" and owner.split(".")[-1] in ("np", "numpy", "jnp") or function == "read_array":
        if not says("allow_pickle", False):
            yield f"{function} without allow_pickle=False"
    elif "allow_pickle" in words and not says("allow_pickle", False):
        yield "allow_pickle"
    if "shell" in words and not says("shell", False):
        yield "shell"
    if "trust_remote_code" in words:
        yield "trust_remote_code"
    if function == "load" and points and not node.args:
        yield "entry_points().load"


def found() -> dict[tuple[str, str], int]:
    return {
        (str(path.relative_to(ROOT)), what): line
        for path in MODULES
        for line, what in uses(ast.parse(path.read_text("utf-8")))
    }


def test_no_module_runs_or_unpickles_a_file() -> None:
    here = found()
    assert len(MODULES) > 200
    assert {where: line for where, line in here.items() if where not in ALLOWED} == {}
    assert [where for where in ALLOWED if where not in here] == [], "no longer there: allow it no longer"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import pickle", "pickle"),
        ("from yaml import load", "yaml"),
        ("f = eval\nf(text)", "eval"),
        ("__builtins__['ex' + 'ec'](text)", "__builtins__"),
        ("np.load(path)", "load without allow_pickle=False"),
        ("np.load(path, allow_pickle=flag)", "load without allow_pickle=False"),
        ("np.lib.format.read_array(file)", "read_array without allow_pickle=False"),
        ("np.savez(path, allow_pickle=True)", "allow_pickle"),
        ("from importlib import import_module as i", "import_module"),
        ("importlib.import_module(config['module'])", "import_module"),
        ("zipfile.ZipFile(path).extractall(folder)", "extractall"),
        ("subprocess.run(line, shell=True)", "shell"),
        ("os.system(line)", "system"),
        ("load_dataset(name, trust_remote_code=True)", "trust_remote_code"),
        ("[p.load() for p in entry_points(group='x')]", "entry_points().load"),
    ],
)
def test_the_search_finds(code: str, what: str) -> None:
    assert what in {name for _, name in uses(ast.parse(code))}


def test_the_search_lets_pass() -> None:
    code = """
    np.load(path, allow_pickle=False)
    json.loads(text); re.compile("x"); lowered.compile(); model.eval(); ast.literal_eval(text)
    subprocess.run([word], shell=False)
    """
    assert list(uses(ast.parse(textwrap.dedent(code)))) == []
