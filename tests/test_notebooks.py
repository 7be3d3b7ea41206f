"""The tutorial notebooks run as they stand, on smaller sizes.

Their code cells are run in order in one namespace, read as plain JSON: that needs no kernel and no further
package, and a warning in a cell is an error as everywhere in the tests.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def cells(name: str) -> list[dict[str, Any]]:
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    return notebook["cells"]


def run(name: str, **sizes: Any) -> dict[str, Any]:
    """Returns the namespace after all cells, with the settings of the first code cell replaced."""
    import matplotlib.pyplot as plt

    space: dict[str, Any] = {"__name__": "__main__"}
    with matplotlib.rc_context():
        plt.switch_backend("agg")
        for cell in cells(name):
            if cell["cell_type"] != "code":
                continue
            exec(compile("".join(cell["source"]), f"{name}.ipynb", "exec"), space)
            if "parameters" in cell["metadata"].get("tags", ()):
                assert sizes.keys() <= space.keys()
                space |= sizes
        plt.close("all")
    return space


@pytest.mark.parametrize("name", NAMES)
def test_notebooks_keep_no_outputs(name: str) -> None:
    code = [cell for cell in cells(name) if cell["cell_type"] == "code"]
    assert len({cell["id"] for cell in cells(name)}) == len(cells(name))
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    assert code[0]["metadata"]["tags"] == ["parameters"]


def test_update_rules_are_compared() -> None:
    space = run("compare_update_rules", STEPS=20, SEEDS=(0, 1), RATES=(1e-2, 3e-2), HIDDEN=(4,))
    assert list(space["tuned"]) == ["adam", "muon", "celo2", "celo2_base"]
    for name, losses in space["losses"].items():
        assert losses.shape == (2, 2, 20) and space["tuned"][name].median < losses[..., 0].mean()
    lines = space["left"].get_lines()
    assert [line.get_label() for line in lines] == list(space["tuned"])


def test_a_rule_is_looked_into() -> None:
    space = run("look_inside_a_rule", WEIGHTS="celo2_base=hand_made", STEPS=4, SEEDS=1, HIDDEN=(4,), POINTS=5)
    # The hand-made rule is normalized momentum, whatever the gradient and the parameter.
    for surface in space["surfaces"].values():
        np.testing.assert_allclose(surface, np.repeat(space["values"][:, None], 5, axis=1), atol=1e-6)
    changes = space["changes"]
    assert changes.pop("momentum") == pytest.approx(1.0, abs=1e-5)
    assert max(changes.values()) < 1e-5 and len(changes) == 13


def test_every_notebook_has_its_test() -> None:
    assert NAMES == ["compare_update_rules", "look_inside_a_rule"]
