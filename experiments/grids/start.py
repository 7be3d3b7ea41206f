"""Is meta-training from a hand-made theta better than from a random one? Celo2, with and without noise."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the grid."""
    start = {
        "random": (),
        "hand-made": ("theta_init.kind=hand_made",),
        "hand-made with noise": ("theta_init.kind=hand_made", "theta_init.noise=0.01"),
    }
    rate = {x: (f"meta.optimizer.learning_rate={x}",) for x in ("3e-4", "1e-3")}
    return ConfigDict(
        dict(
            question="Does a hand-made start lead further than a random one?",
            base="celo2:fast_local",
            overrides=("run.devices=1", "run.iterations=300"),
            axes=(("start", start), ("rate", rate)),
            seeds=(0, 1, 2),
            # So short a course of the meta-loss hardly tells variants apart. The suite's runs have 200 steps,
            # those of meta-training 100 to 2,000.
            suite="smoke",
        )
    )
