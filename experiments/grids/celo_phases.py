"""What makes Celo? One phase or two, a learned schedule or none, parameter-scaled steps, augmentation."""

from ml_collections import ConfigDict

RULE = dict(name="rule", iterations=150, set=("optimizer.schedule.rate=none", "meta.frozen=schedule/"))
SCHEDULE = dict(name="schedule", iterations=0, set=("meta.frozen=update_rule/",))


def get_config() -> ConfigDict:
    """Returns the grid."""
    return ConfigDict(
        dict(
            question="What do Celo's two phases, learned schedule, step scale and augmentation each add?",
            base="celo:fast_local",
            overrides=("run.devices=1", "run.iterations=300", "meta.optimizer.learning_rate=3e-4"),
            axes=(
                (
                    "variant",
                    {
                        "one phase": (),
                        "two phases": (f"meta.phases={(RULE, SCHEDULE)!r}",),
                        "no schedule": ("optimizer.schedule.rate=none", "meta.frozen=schedule/"),
                        "steps not scaled": ("optimizer.step.parameter_scale=False",),
                        "no augmentation": ("meta.augmentation.kind=none",),
                    },
                ),
            ),
            seeds=(0, 1, 2),
            # Without augmentation the meta-loss is of another scale. A schedule shows in longer runs than
            # smoke's: these have 1,000 steps, those of meta-training 100 to 2,000.
            suite="selection",
        )
    )
