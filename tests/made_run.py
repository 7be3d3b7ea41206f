"""Run folders as ``celo-nnx train`` leaves them, from given numbers and without training."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import fake_run

BEGIN = 1_700_000_000.0
VERSIONS = {"python": "3.12.0", "jax": "0.10.2"}
DEVICES = {"platform": "cpu", "kind": "cpu", "count": 2}


def row(iteration: int, loss: float | None, moment: float, **more: Any) -> dict[str, Any]:
    """A row of two families, ``one`` 0.5 above and ``two`` 0.5 below the meta-loss."""
    families = {"one": None if loss is None else loss + 0.5, "two": None if loss is None else loss - 0.5}
    scalars = {"loss": loss, "gradient_norm": 2.0, "theta_norm": 10.0, "update_norm": 0.001}
    rest = {"family_loss": families, "nonfinite": {"one": int(loss is None), "two": 0}, "time": moment}
    return {"iteration": iteration, **scalars, **rest, **more}


def course(losses: Sequence[float | None], first: int = 1, begin: float = BEGIN + 10) -> list[dict[str, Any]]:
    """Rows of which every two share a time, as those of a dispatch do; dispatches are a second apart."""
    return [row(first + i, loss, begin + i // 2) for i, loss in enumerate(losses)]


def append(folder: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Adds rows to the log."""
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)


def make(
    folder: Path,
    rows: Iterable[dict[str, Any]] = (),
    total: int = 100,
    starts: Sequence[tuple[float, int]] = ((BEGIN, 0),),
    config: dict[str, Any] | None = None,
) -> Path:
    """Writes a run folder.

    Args:
      folder: new.
      rows: of the log.
      total: meta-iterations wanted.
      starts: (time, iteration) of each.
      config: whole; the stand-in trainer's by default.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or fake_run.config(total)))
    info = {"versions": VERSIONS, "devices": DEVICES, "xla_flags": ""}
    entries = [{"time": moment, "iteration": iteration, **info} for moment, iteration in starts]
    (folder / "run_info.json").write_text(json.dumps({"data": {"one": "ab" * 32}, "starts": entries}))
    append(folder, rows)
    return folder
