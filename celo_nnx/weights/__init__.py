"""Meta-trained weights that come with the package: by name a theta file and a card that says what it is.

=================  =========================================================================================
``NAME.safetensors``  theta, as ``celo-nnx train`` writes it
``NAME.json``      the card: digest of theta, recipe, data, devices, versions, scores, learning rate
=================  =========================================================================================

Both are data: theta's digest is checked when it is read (:func:`celo_nnx.theta_io.load_theta`). A name stands
wherever a path of weights may: ``celo_nnx.celo2(weights="celo2_base")``, ``evaluate --weights celo2=...``,
``theta_init.path=celo2``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celo_nnx.errors import UserError, unknown
from celo_nnx.files import read_json

FOLDER = Path(__file__).parent
FORMAT = "celo_nnx.card/1"
HAND_MADE = "hand_made"  # stands for theta made by hand, of any variant


def names() -> tuple[str, ...]:
    """Returns the names of the weights that are here."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.safetensors")))


def theta_file(name: str) -> Path:
    """Returns the file of weights that are here.

    Raises:
      UserError: there are none of that name.

    Example:
      >>> theta_file("celo2").name
      'celo2.safetensors'
    """
    if name not in names():
        raise unknown("weights", name, names())
    return FOLDER / f"{name}.safetensors"


def locate(path: str | os.PathLike[str]) -> Path:
    """Returns the theta file of a name, and any other path as it is; what exists is a path, not a name.

    Example:
      >>> locate("celo2").name, str(locate("runs/a"))
      ('celo2.safetensors', 'runs/a')
    """
    given = Path(path)
    return theta_file(str(path)) if str(path) in names() and not given.exists() else given


def card(name: str) -> dict[str, Any]:
    """Returns the card of weights.

    Raises:
      UserError: there are none of that name, or its card is not one.

    Example:
      >>> card("celo2")["name"]
      'celo2'
    """
    path = theta_file(name).with_suffix(".json")
    found = read_json(path)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UserError(f"{path} is not a card of weights (no {FORMAT!r})")
    return found


def about(name: str) -> str:
    """Says in a line what weights are."""
    found = card(name)
    return str(found.get("about", ""))
