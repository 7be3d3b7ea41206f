"""What do orthogonalization, Adam for vectors, weight decay and the input's axes each add to Celo2?"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the grid."""
    step = {
        "newton_schulz": (),
        "none": ("optimizer.orthogonalization.kind=identity",),
    }
    rule = {
        "adam for vectors": (),
        "learned for all": ("optimizer.routing.kind=single",),
    }
    return ConfigDict(
        dict(
            question="What does each of Celo2's additions to the learned rule change?",
            base="celo2:fast_local",
            overrides=("run.devices=1", "run.iterations=300", "meta.optimizer.learning_rate=1e-3"),
            axes=(("step", step), ("rule", rule)),
            cells=(
                ("weight decay 0.1", ("optimizer.weight_decay=0.1",)),
                ("input over all axes", ("optimizer.normalization.axes=all",)),
                ("input as it is", ("optimizer.normalization.kind=identity",)),
            ),
            seeds=(0, 1, 2),
            # So short a course of the meta-loss hardly tells variants apart. The suite's runs have 200 steps,
            # those of meta-training 100 to 2,000.
            suite="smoke",
        )
    )
