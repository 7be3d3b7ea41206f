"""Which estimator of the meta-gradient learns most at equal compute? PES, ES, noise reuse, full ES."""

from ml_collections import ConfigDict

KIND = "meta.estimator.kind"


def get_config() -> ConfigDict:
    """Returns the grid."""
    # Trajectories of 100 to 1,000 steps are 391 long on average (log-uniform): 8 truncations of 50. So one
    # meta-iteration of full ES does the inner steps of 8 others.
    kind = {
        "pes": (f"{KIND}=pes", "run.iterations=800"),
        "truncated es": (f"{KIND}=truncated_es", "run.iterations=800"),
        "noise reuse": (f"{KIND}=shared_noise", "run.iterations=800"),
        "full es": (f"{KIND}=full_es", "run.iterations=100"),
    }
    return ConfigDict(
        dict(
            question="Which estimator of the meta-gradient learns most from equally many inner steps?",
            base="celo2:fast_local",
            overrides=("run.devices=1", "meta.optimizer.learning_rate=1e-3", "meta.unroll.maximum=1000"),
            axes=(("estimator", kind),),
            seeds=(0, 1, 2),
            # What they log as their loss is the mean over a truncation or the loss at the end.
            suite="smoke",
        )
    )
