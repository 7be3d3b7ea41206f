"""Estimators of the meta-gradient."""

from celo_nnx.meta.estimators.pes import PES

ESTIMATORS = {"pes": PES}

__all__ = ["ESTIMATORS", "PES"]
