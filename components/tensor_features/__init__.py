"""Numbers about one tensor and the run: the schedule's rows, the update rule's context. One line adds one.

A section ``optimizer.rows`` or ``optimizer.context`` names each feature freely and says its ``kind``; they
are put in the order of their names.
"""

from celo_nnx.components.tensor_features.moments import NormalizedMoment
from celo_nnx.components.tensor_features.run import Constant, LogTensors, Loss, Shown
from celo_nnx.components.tensor_features.shape import IsRank, LogShape, LogSize, Rank
from celo_nnx.components.tensor_features.statistics import LogNorm, LogStatistic, SignOfMean
from celo_nnx.components.tensor_features.time import TimeFraction, TimeSine, TimeTanh

TENSOR_FEATURES = {
    "time_fraction": TimeFraction,
    "time_tanh": TimeTanh,
    "time_sine": TimeSine,
    "loss": Loss,
    "shown": Shown,
    "constant": Constant,
    "log_tensors": LogTensors,
    "rank": Rank,
    "is_rank": IsRank,
    "log_shape": LogShape,
    "log_size": LogSize,
    "log_norm": LogNorm,
    "log_statistic": LogStatistic,
    "sign_of_mean": SignOfMean,
    "normalized_moment": NormalizedMoment,
}
