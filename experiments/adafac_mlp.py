"""adafac MLP (small_fc_lopt): no schedule, learned decays, time as context of the MLP."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo
from celo_nnx.experiments.celo2_base import FOURTEEN


def rule(learned: bool = True, hidden: tuple[int, ...] = (4, 4)) -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 8)."""
    section = celo.rule()
    decays = section["accumulators"]
    options = dict(celo.OPTIONS, factored_momentum=dict(unfactored=True, eps=1e-6))
    return section | dict(
        clip=dict(kind="none"),
        accumulators={name: bank | dict(learned=learned) for name, bank in decays.items()},
        features=dict(
            groups=tuple(g for g in FOURTEEN if g not in ("clipped_gradient", "gradient_rms")),
            options=options,
        ),
        context=dict(time_tanh=dict(kind="time_tanh")),
        update_rule=dict(kind="split_mlp", hidden=hidden, outputs=2),
        step=dict(kind="direction", exp_mult=1e-3),
        tracker=dict(kind="none"),
        rows={},
        schedule=dict(kind="constant", value=1e-3),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
