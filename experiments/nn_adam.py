"""NN-Adam: an LSTM for each tensor moves its Adam hyperparameters."""

from typing import Any

from ml_collections import ConfigDict

from celo_nnx.config import experiment
from celo_nnx.experiments import celo


def _log(of: str, statistic: str) -> dict[str, Any]:
    return dict(kind="log_statistic", of=of, statistic=statistic, factor=1.0, gain=0.5)


def _stored(name: str) -> dict[str, Any]:
    return dict(kind="shown", name=name, gain=0.2, limit=5.0)


ROWS = dict(
    beta1=_stored("b1"),
    beta2=_stored("b2"),
    epsilon=_stored("eps"),
    is_bias=dict(kind="is_rank", rank=1),
    is_scalar=dict(kind="is_rank", rank=0),
    lr=_stored("lr"),
    mean_g_mag=_log("gradient", "mean"),
    mean_g_sign=dict(kind="sign_of_mean", of="gradient"),
    mean_gabs_mag=_log("gradient", "mean_abs"),
    mean_m_mag=_log("momentum", "mean"),
    mean_m_sign=dict(kind="sign_of_mean", of="momentum"),
    mean_p_mag=_log("parameter", "mean"),
    mean_p_sign=dict(kind="sign_of_mean", of="parameter"),
    mean_rms=_log("second_moment", "mean"),
    mean_sign=dict(kind="sign_of_mean", of="second_moment"),
    **{
        f"var_{n}": _log(q, "variance") for n, q in (("g", "gradient"), ("m", "momentum"), ("p", "parameter"))
    },
    var_rms=_log("second_moment", "variance"),
)


def rule() -> dict[str, Any]:
    """Returns the section ``optimizer`` (OPTIMIZERS section 9)."""
    return celo.rule() | dict(
        accumulators={n: dict(kind=n, decays=(d,)) for n, d in (("momentum", 0.9), ("second_moment", 0.999))},
        features=dict(groups=("momentum", "second_moment"), options={}),
        normalization=dict(kind="identity"),
        update_rule=dict(kind="adam", eps=1e-8, floor=1e-10, scale_by_eps=True),
        step=dict(kind="direction"),
        tracker=dict(kind="none"),
        rows=ROWS,
        schedule=dict(kind="adam_hyperparameters", hidden=64),
    )


def get_config(tasks: str = "fast_local") -> ConfigDict:
    """Returns the config on a task preset."""
    return experiment(rule(), tasks)
