"""RNN-MLP: an LSTM for each tensor gives its MLP 17 numbers and takes 16 back."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo

DECAYS = (0.5, 0.9, 0.99, 0.999, 0.9999)
EPS = {name: dict(eps=1e-6) for name in ("momentum_rms", "rsqrt_second_moment")}


def _log(of: str, statistic: str) -> dict[str, Any]:
    return dict(kind="log_statistic", of=of, statistic=statistic, factor=1.0, gain=1.0)


ROWS = dict(
    from_lstm=dict(kind="shown", name="from_lstm"),
    from_mlp=dict(kind="shown", name="from_mlp"),
    g_norm=_log("gradient", "norm"),
    is_scalar=dict(kind="is_rank", rank=0),
    mean_ms_mag=_log("momentum", "mean"),
    mean_ms_sign=dict(kind="sign_of_mean", of="momentum"),
    mean_rms=_log("second_moment", "mean"),
    mean_sign=dict(kind="sign_of_mean", of="second_moment"),
    mean_v_mag=_log("parameter", "mean"),
    mean_v_sign=dict(kind="sign_of_mean", of="parameter"),
    norm_weight=_log("parameter", "norm"),
    shape=dict(kind="log_shape", axes=4),
    train_loss_feat=dict(kind="loss", index=0),
    valid_loss_feat=dict(kind="loss", index=1),
    var_ms=_log("momentum", "variance"),
    var_rms=_log("second_moment", "variance"),
    var_v=_log("parameter", "variance"),
)
CONTEXT = {name: dict(kind=name) for name in ("time_sine", "log_tensors", "log_norm", "log_size")}
GROUPS = ("gradient", "parameter", "log_parameter", "momentum", "second_moment", *EPS)


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 7)."""
    return celo.rule() | dict(
        clip=dict(kind="dynamic", multiplier=10.0, decay=0.99),
        accumulators={n: dict(kind=n, decays=DECAYS) for n in ("momentum", "second_moment")},
        features=dict(groups=GROUPS, options=EPS),
        context=CONTEXT | dict(controls=dict(kind="shown", name="controls")),
        update_rule=dict(kind="split_mlp", hidden=(32, 32), outputs=18, feedback=16),
        step=dict(kind="direction", exp_mult=1e-3),
        tracker=dict(kind="loss_normalizer", decay=0.9),
        rows=ROWS,
        schedule=dict(kind="lstm_feedback", value=1e-3, hidden=64, context=17, shared=18, own=16),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
