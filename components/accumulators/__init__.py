"""Accumulators: per-tensor statistics of the gradient. One file and one line here add one."""

from celo_nnx.components.accumulators.factored import Factored
from celo_nnx.components.accumulators.momentum import Momentum
from celo_nnx.components.accumulators.second_moment import SecondMoment

ACCUMULATORS = {
    "momentum": Momentum,
    "second_moment": SecondMoment,
    "factored": Factored,
}
