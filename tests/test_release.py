"""What a release is made of agrees: version, changelog, citation, notices, the forge's workflow."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import celo_nnx

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text()


def requirements() -> dict[str, str]:
    """Returns name -> bounds of everything that the package or an extra needs."""
    extras = PROJECT["project"]["optional-dependencies"]
    every = [*PROJECT["project"]["dependencies"], *(need for extra in extras.values() for need in extra)]
    pairs = (re.fullmatch(r"([\w-]+)(?:\[\w+\])?(.*)", need) for need in every)
    return {found[1]: found[2] for found in reversed([*pairs]) if found is not None}  # the first counts


def test_the_version_stands_in_one_place() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "celo_nnx.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", celo_nnx.__version__)


def test_the_changelog_begins_with_it() -> None:
    newest = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None and newest[1] == celo_nnx.__version__
    assert newest[2] == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", newest[2])


def test_the_citation_is_of_it() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    found = dict(re.findall(r"^([\w-]+): *(.+)$", text, re.MULTILINE))
    assert found["version"] == celo_nnx.__version__
    assert found["license"] == PROJECT["project"]["license"]
    assert {"cff-version", "message", "title", "type"} <= set(found) and "\nauthors:\n" in text
    assert f'- name: "{PROJECT["project"]["authors"][0]["name"]}"' in text
    titles = re.findall(r"title: \"(.*?)[\":]", text)  # up to a colon
    readme = (ROOT / "README.md").read_text().partition("\n## References\n")[2]
    named = re.findall(r"(?:^|\. )(\w+): ", " ".join(readme.split()))
    assert "Celo2" in named and set(named) - {"PES"} <= set(titles)  # PES has its long name


def test_every_library_is_in_the_notices() -> None:
    text = (ROOT / "THIRD_PARTY_NOTICES.md").read_text().lower()
    for name in requirements():
        shown = name.lower()
        assert shown in text or shown.replace("-", "_") in text, name


def test_the_workflow_tries_what_is_supported() -> None:
    assert "-c .ci/lowest.txt" in WORKFLOW
    pythons = re.search(r"python: \[(.*)\]", WORKFLOW)
    least = PROJECT["project"]["requires-python"].removeprefix(">=")
    assert pythons is not None and pythons[1].startswith(f'"{least}"')
    assert "ubuntu-latest, macos-latest" in WORKFLOW and "[lowest, highest]" in WORKFLOW
    classifiers = PROJECT["project"]["classifiers"]
    named = re.findall(r"Python :: (3\.\d+)", "\n".join(classifiers))
    assert ", ".join(f'"{name}"' for name in named) == pythons[1]
    assert {"Operating System :: MacOS", "Operating System :: POSIX :: Linux"} <= set(classifiers)


def test_the_lowest_versions_are_the_lower_bounds() -> None:
    text = (ROOT / ".ci" / "lowest.txt").read_text()
    named = dict(re.findall(r"^([\w-]+)==(.+)$", text, re.MULTILINE))
    needed = [re.match(r"([\w-]+)>=([\d.]+)", need) for need in PROJECT["project"]["dependencies"]]
    bounds = {found[1]: found[2] for found in needed if found is not None}
    assert len(bounds) == len(needed) and named == bounds | {"jaxlib": bounds["jax"]}


def test_scripts_that_the_workflow_and_ci_name_are_there() -> None:
    for text in (WORKFLOW, (ROOT / ".ci" / "run").read_text()):
        named = re.findall(r"bash (\.ci/\w+)", text)
        assert len(named) >= 2 and all((ROOT / name).is_file() for name in named)
