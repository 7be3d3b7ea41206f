"""Does augmentation help on unseen tasks, and which level of reparametrization? Celo2-base."""

from ml_collections import ConfigDict

KIND = "meta.augmentation.kind"


def get_config() -> ConfigDict:
    """Returns the grid."""
    level = {
        "none": (f"{KIND}=none",),
        **{x: (f"meta.augmentation.level={x}",) for x in ("global", "tensor", "parameter")},
        "list": (f"{KIND}=reparametrization_list",),
    }
    return ConfigDict(
        dict(
            question="Does augmenting the training tasks help on unseen tasks, and at which level?",
            base="celo2_base:fast_local",
            overrides=("run.devices=1", "run.iterations=300", "meta.optimizer.learning_rate=1e-3"),
            axes=(("augmentation", level),),
            seeds=(0, 1, 2),
            # Meta-losses of differently augmented tasks are not of one scale. Unlike smoke, this suite has no
            # task of fast_local's kind, an MLP on images; 1,000 steps, in meta-training 100 to 2,000.
            suite="selection",
        )
    )
