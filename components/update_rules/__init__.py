"""Update rules, step heads and hand-made rules for routes. One file and one line here add one.

An update rule maps a tensor's planes to a direction and a log-magnitude; a step head turns those into a
step; a route rule is a whole hand-made optimizer for the tensors that a route sends to it.
"""

from celo_nnx.components.update_rules.adam import Celo2Adam
from celo_nnx.components.update_rules.adam_rule import AdamRule
from celo_nnx.components.update_rules.optax_rule import OptaxRule
from celo_nnx.components.update_rules.split_mlp import SplitMLP
from celo_nnx.components.update_rules.steps import DirectionStep

UPDATE_RULES = {
    "split_mlp": SplitMLP,
    "adam": AdamRule,
}

STEPS = {
    "direction": DirectionStep,
}

ROUTE_RULES = {
    "celo2_adam": Celo2Adam,
    "optax": OptaxRule,
}
