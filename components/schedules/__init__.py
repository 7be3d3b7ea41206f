"""Schedules of the learning rate. One file and one line here add one."""

from celo_nnx.components.schedules.constant import Constant
from celo_nnx.components.schedules.optax_schedule import OptaxSchedule

SCHEDULES = {
    "constant": Constant,
    "optax": OptaxSchedule,
}
