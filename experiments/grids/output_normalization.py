"""What must the rule's output be divided by? Its RMS at each step, nothing, a rolling RMS, or a ceiling."""

from ml_collections import ConfigDict

OUTPUT = "optimizer.output_normalization"
KIND = f"{OUTPUT}.kind"


def get_config() -> ConfigDict:
    """Returns the grid."""
    output = {
        "per-step RMS": (f"{KIND}=second_moment",),
        "raw": (f"{KIND}=identity",),
        "rolling": (f"{KIND}=rolling",),
        # A random theta's raw steps have an RMS of 0.05 to 0.4: most are cut, and are all as large then.
        "clipped": (f"{KIND}=clipped", f"{OUTPUT}.limit=0.1", f"{OUTPUT}.gain=10.0"),
    }
    rule = {
        "learned alone": ("optimizer.orthogonalization.kind=identity", "optimizer.routing.kind=single"),
        "celo2": (),
    }
    return ConfigDict(
        dict(
            question="Must the output be divided by its RMS, that of each step or of many, or only limited?",
            base="celo2:fast_local",
            overrides=("run.iterations=300", "run.devices=1", "meta.optimizer.learning_rate=1e-3"),
            axes=(("output", output), ("rule", rule)),
            seeds=(0, 1, 2),
            suite="smoke",
        )
    )
