"""How large must the update MLP be? Width and depth of Celo2's."""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Returns the grid."""
    widths, depths = (8, 4, 16, 32), (2, 1, 3)
    sizes = {
        f"{width} x {depth}": (f"optimizer.update_rule.hidden={(width,) * depth}",)
        for depth in depths
        for width in widths
    }
    return ConfigDict(
        dict(
            question="How does the meta-trained rule depend on the width and depth of its update MLP?",
            base="celo2:fast_local",
            overrides=("run.devices=1", "run.iterations=300", "meta.optimizer.learning_rate=1e-3"),
            axes=(("hidden", sizes),),
            seeds=(0, 1, 2),
            # So short a course of the meta-loss hardly tells variants apart. The suite's runs have 200 steps,
            # those of meta-training 100 to 2,000.
            suite="smoke",
        )
    )
