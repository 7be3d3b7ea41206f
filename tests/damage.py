"""Damages every file of a run's newest checkpoint, one at a time, and counts what a reader makes of it."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from celo_nnx.meta import checkpoint, manifest

SHARES = 16  # of a file's length, at which it is cut off


def damages(whole: bytes, cuts: list[int], flips: int, rng: np.random.Generator) -> Iterator[bytes]:
    """The bytes of a file cut off at sixteenths of its length, and with one bit flipped at drawn places."""
    for cut in cuts if whole else []:
        yield whole[: len(whole) * cut // SHARES]
    for place in rng.integers(0, len(whole), flips if whole else 0):
        broken = bytearray(whole)
        broken[place] ^= 1 << int(rng.integers(8))
        yield bytes(broken)


def bits(state: Any) -> dict[str, bytes]:
    """The bytes of every leaf, by path."""
    return {k: v.tobytes() for k, v in checkpoint.to_host(state).items()}


def sweep(
    folder: Path,
    like: Callable[[int], Any],
    *,
    cuts: list[int],
    flips: int,
    seed: int = 0,
    named: bool = True,
) -> collections.Counter[str]:
    """Damages each file of the newest step in turn and reads the folder.

    Args:
      folder: of checkpoints, at least two; as it was in the end.
      like: as for :func:`celo_nnx.meta.checkpoint.load`.
      cuts: at which sixteenths files are cut off.
      flips: bits of each file that are flipped, one at a time.
      seed: of the places.
      named: with the manifest; without it as after a kill before it was written.

    Returns:
      Counts: ``equal`` (nothing reads that byte, every leaf is what it was), ``refused`` (the step before
      was read, every leaf is what it was), ``named`` of those with the file's name, ``wrong`` for all else.
    """
    steps = checkpoint.steps(folder)
    newest, before = (folder / str(step) for step in reversed(steps[-2:]))
    if not named:
        (newest / manifest.FILE_NAME).unlink()
    want = {step: bits(checkpoint.load_step(folder, step, like(step))[0]) for step in steps[-2:]}
    rng, counts = np.random.default_rng(seed), collections.Counter(equal=0, refused=0, named=0, wrong=0)
    for file in sorted(path for path in newest.rglob("*") if path.is_file()):
        whole = file.read_bytes()
        for broken in damages(whole, cuts, flips, rng):
            file.write_bytes(broken)
            found = checkpoint.load(folder, like)
            good = bits(found.state) == want[found.step]
            reasons = [reason for _, reason in found.refused]
            if good and found.step == steps[-1] and not reasons:
                counts["equal"] += 1
            elif good and str(found.step) == before.name and len(reasons) == 1 and str(newest) in reasons[0]:
                counts["refused"] += 1
                counts["named"] += str(file) in reasons[0]
            else:
                counts["wrong"] += 1
        file.write_bytes(whole)
    return counts
