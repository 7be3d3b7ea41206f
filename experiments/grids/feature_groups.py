"""Which feature groups does the learned rule need? Celo2-base with each left out, one by one."""

from ml_collections import ConfigDict

from celo_nnx.experiments.celo2_base import FOURTEEN


def without(group: str) -> tuple[str, ...]:
    """Returns the override that leaves a group out."""
    return (f"optimizer.features.groups={','.join(name for name in FOURTEEN if name != group)}",)


def get_config() -> ConfigDict:
    """Returns the grid."""
    groups = {"all": ()} | {f"no {name}": without(name) for name in FOURTEEN}
    return ConfigDict(
        dict(
            question="Which of the fourteen feature groups does the learned rule need?",
            base="celo2_base:fast_local",
            overrides=("run.devices=1", "run.iterations=300", "meta.optimizer.learning_rate=1e-3"),
            axes=(("features", groups),),
            seeds=(0, 1, 2),
            # So short a course of the meta-loss hardly tells variants apart. The suite's runs have 200 steps,
            # those of meta-training 100 to 2,000.
            suite="smoke",
        )
    )
