"""How many momenta does Celo2 need, and how slow? Banks of one to four decays."""

from ml_collections import ConfigDict

KEY = "optimizer.accumulators.momentum.decays"


def get_config() -> ConfigDict:
    """Returns the grid."""
    # The second momenta of the features are matched with momenta by decay or shared: there is one.
    bank = {
        "0.9 0.99 0.999": (f"{KEY}=(0.9,0.99,0.999)",),
        "0.9": (f"{KEY}=(0.9,)",),
        "0.99": (f"{KEY}=(0.99,)",),
        "0.9 0.99": (f"{KEY}=(0.9,0.99)",),
        "0.5 0.9 0.99 0.999": (f"{KEY}=(0.5,0.9,0.99,0.999)",),
    }
    return ConfigDict(
        dict(
            question="How many momenta does Celo2 need, and how slow?",
            base="celo2:fast_local",
            overrides=(
                "run.devices=1",
                "run.iterations=300",
                "meta.optimizer.learning_rate=1e-3",
                # This group has a plane for each pair of a momentum and a factored moment of one decay.
                "optimizer.features.groups=gradient,parameter,momentum,momentum_rms,second_moment,row,column",
            ),
            axes=(("momenta", bank),),
            seeds=(0, 1, 2),
            # So short a course of the meta-loss hardly tells variants apart, and a slow momentum needs longer
            # runs than smoke's: these have 1,000 steps, those of meta-training 100 to 2,000.
            suite="selection",
        )
    )
