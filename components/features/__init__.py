"""Feature groups by name. One file and one line here add one.

A group turns one tensor's view into planes, elementwise: the kernel evaluates it on blocks of rows, so
anything that looks across a tensor belongs in an accumulator's ``read``.
"""

from celo_nnx.components.features.factored import (
    Column,
    FactoredGradient,
    FactoredMomentum,
    Row,
    RsqrtColumn,
    RsqrtRow,
)
from celo_nnx.components.features.plain import (
    ClippedGradient,
    Gradient,
    LogParameter,
    MomentumBank,
    Parameter,
    SecondMomentBank,
)
from celo_nnx.components.features.preconditioned import GradientRms, MomentumRms, RsqrtSecondMoment

FEATURES = {
    "gradient": Gradient,
    "clipped_gradient": ClippedGradient,
    "parameter": Parameter,
    "log_parameter": LogParameter,
    "momentum": MomentumBank,
    "second_moment": SecondMomentBank,
    "momentum_rms": MomentumRms,
    "rsqrt_second_moment": RsqrtSecondMoment,
    "factored_gradient": FactoredGradient,
    "gradient_rms": GradientRms,
    "row": Row,
    "column": Column,
    "rsqrt_row": RsqrtRow,
    "rsqrt_column": RsqrtColumn,
    "factored_momentum": FactoredMomentum,
}
