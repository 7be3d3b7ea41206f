"""The plain twin of a config's optimizer, where it is one of the published presets as they stand."""

from __future__ import annotations

from typing import Any

from celo_nnx.errors import UserError
from celo_nnx.interfaces import Optimizer
from celo_nnx.naive import from_config
from celo_nnx.naive_zoo.adafac_mlp import NaiveAdafacMLP
from celo_nnx.naive_zoo.celo import NaiveCelo, Options
from celo_nnx.naive_zoo.celo_adam import NaiveCeloAdam
from celo_nnx.naive_zoo.elo import NaiveElo, NaiveMulo
from celo_nnx.naive_zoo.nn_adam import NaiveNNAdam
from celo_nnx.naive_zoo.rnn_mlp import NaiveRNNMLP
from celo_nnx.naive_zoo.velo import NaiveVelo

CELO2 = ("celo2", "celo2_base", "celo2_published")
TWINS: dict[str, Optimizer] = {
    "celo": NaiveCelo(None),
    "celo_phase1": NaiveCelo(None, Options(scheduled=False)),
    "celo_adam": NaiveCeloAdam(None),
    "velo": NaiveVelo(None),
    "velo_s": NaiveVelo(None),
    "rnn_mlp": NaiveRNNMLP(None),
    "adafac_mlp": NaiveAdafacMLP(None),
    "nn_adam": NaiveNNAdam(None),
    "elo": NaiveElo(None),
    "mulo": NaiveMulo(None),
}


def twin(optimizer: Any) -> Optimizer:
    """Returns the plain twin, without theta, of a config's section ``optimizer``.

    Args:
      optimizer: the resolved section; equal to that of a preset of :data:`CELO2` or :data:`TWINS`.

    Raises:
      UserError: the section is none of theirs.

    Example:
      >>> from celo_nnx.config import load
      >>> type(twin(load("celo_adam").optimizer)).__name__
      'NaiveCeloAdam'
    """
    from celo_nnx.config import load

    for name in (*CELO2, *TWINS):
        if load(name).optimizer.to_dict() == optimizer.to_dict():
            return from_config(optimizer) if name in CELO2 else TWINS[name]
    raise UserError(
        "the plain twin knows the published optimizers as they stand, not this one: "
        f"{', '.join((*CELO2, *TWINS))}"
    )
