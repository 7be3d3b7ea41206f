"""Meta-training: tasks, truncation schedules and estimators in, theta out. Knows no part of an optimizer."""

from celo_nnx.meta.assemble import build_estimator, build_trainer, pairs_of
from celo_nnx.meta.meta_optimizers import meta_optimizer
from celo_nnx.meta.trainer import MetaTrainer

__all__ = ["MetaTrainer", "build_estimator", "build_trainer", "meta_optimizer", "pairs_of"]
