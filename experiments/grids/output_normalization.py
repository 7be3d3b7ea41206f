"""Must the learned rule's output be normalized, and over which axes? Raw, per-step RMS, and two rules."""

from ml_collections import ConfigDict

KIND = "optimizer.output_normalization.kind"
AXES = "optimizer.output_normalization.axes"


def get_config() -> ConfigDict:
    """Returns the grid."""
    output = {
        "matrix": (f"{KIND}=second_moment", f"{AXES}=matrix"),
        "raw": (f"{KIND}=identity",),
        "rows": (f"{KIND}=second_moment", f"{AXES}=rows"),
        "all": (f"{KIND}=second_moment", f"{AXES}=all"),
    }
    rule = {
        "learned alone": ("optimizer.orthogonalization.kind=identity", "optimizer.routing.kind=single"),
        "celo2": (),
    }
    return ConfigDict(
        dict(
            question="Must the learned rule's output be divided by its RMS, and over which axes?",
            base="celo2:fast_local",
            overrides=("run.iterations=300", "meta.optimizer.learning_rate=1e-3"),
            axes=(("output", output), ("rule", rule)),
            seeds=(0, 1, 2),
        )
    )
