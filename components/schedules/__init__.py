"""Schedules: the learning rate and what else is decided per tensor. One file and one line here add one."""

from celo_nnx.components.schedules.constant import Constant
from celo_nnx.components.schedules.feedback import FeedbackLstm
from celo_nnx.components.schedules.hyperparameters import AdamHyperparameters
from celo_nnx.components.schedules.lstm import LstmSchedule
from celo_nnx.components.schedules.optax_schedule import OptaxSchedule

SCHEDULES = {
    "constant": Constant,
    "optax": OptaxSchedule,
    "lstm": LstmSchedule,
    "lstm_feedback": FeedbackLstm,
    "adam_hyperparameters": AdamHyperparameters,
}
