"""Does memory help Celo2's rule? Celo2-base with an LSTM for each tensor as context of its MLP."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo2_base, rnn_mlp


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer``."""
    return celo2_base.rule() | dict(
        context=dict(controls=dict(kind="shown", name="controls")),
        update_rule=dict(kind="split_mlp", hidden=(8, 8), outputs=10, feedback=8),
        tracker=dict(kind="loss_normalizer", decay=0.9),
        rows=rnn_mlp.ROWS,
        schedule=dict(kind="lstm_feedback", value=1e-3, hidden=16, context=8, shared=8, own=8),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
