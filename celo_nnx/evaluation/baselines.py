"""The hand-made optimizers that learned ones are compared with: a table, half-decade grids, two schedules.

The first fifteen are those of the papers (VeLO, Celo), by optax's rules and the papers' constants; the rest
are newer. Every constant that differs between libraries is written out here. Muon sends tensors that are not
matrices to Adam, as optax's does. SOAP and Shampoo are not here: optax has neither, and no maintained package
of them runs with current optax (optax-shampoo is of 2022, and all need chex, which optax has dropped).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import optax

from celo_nnx.errors import require, unknown
from celo_nnx.evaluation.rules import nadamw, sm3
from celo_nnx.interfaces import Array, PyTree

Rate = optax.ScalarOrSchedule


def trained(state: Any, params: PyTree) -> PyTree:
    """The parameters to evaluate at, for a rule that evaluates where it trains."""
    return params


@dataclasses.dataclass(frozen=True)
class Baseline:
    """A hand-made optimizer whose learning rate is tuned.

    Attributes:
      make: gives the rule for a learning rate: a number, which may be traced, or a schedule.
      grid: the learning rates that tuning starts from, ``10^(i/2)`` for ``i`` from the first number to the
        second; tuning widens it where the best lies on an edge.
      about: the rule's constants in a few words.
      source: the paper.
      eval_params: (optimizer state, parameters) -> the parameters at which held-out losses are taken.
    """

    make: Callable[[Rate], optax.GradientTransformation]
    grid: tuple[int, int]
    about: str
    source: str
    eval_params: Callable[[Any, PyTree], PyTree] = trained


def _schedule_free(rate: Rate) -> optax.GradientTransformationExtraArgs:
    # optax's alias takes numbers only; this is its definition, which a schedule fits as well.
    adam = optax.chain(
        optax.scale_by_rms(decay=0.999, eps=1e-8, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(0.0),
        optax.scale_by_learning_rate(rate),
    )
    return optax.contrib.schedule_free(adam, learning_rate=rate, b1=0.9, weight_lr_power=2.0)


# The papers tune every rule over one half-decade grid; these are parts of it around each rule's usual rates,
# seven at most, and tuning widens them where they turn out too narrow.
BASELINES: dict[str, Baseline] = {
    "adam": Baseline(
        lambda rate: optax.adam(rate, b1=0.9, b2=0.999, eps=1e-8, eps_root=1e-8),
        (-8, -2),
        "betas .9 .999, eps 1e-8 outside the root and 1e-8 inside it, as the papers' Adam",
        "Kingma and Ba, arXiv:1412.6980; eps_root as in learned_optimization",
    ),
    "sgd": Baseline(optax.sgd, (-4, 1), "no momentum", "Robbins and Monro, 1951"),
    "sgdm": Baseline(lambda rate: optax.sgd(rate, momentum=0.9), (-6, 0), "momentum .9", "Polyak, 1964"),
    "adamw": Baseline(
        lambda rate: optax.adamw(rate, weight_decay=1e-4),
        (-8, -2),
        "betas .9 .999, eps 1e-8, weight decay 1e-4 on all tensors, times the learning rate",
        "Loshchilov and Hutter, arXiv:1711.05101",
    ),
    "rmsprop": Baseline(
        lambda rate: optax.rmsprop(rate, decay=0.9, eps=1e-8),
        (-8, -2),
        "decay .9, eps 1e-8 inside the root, no momentum",
        "Tieleman and Hinton, 2012",
    ),
    "fromage": Baseline(optax.fromage, (-6, -1), "norms at least 1e-6", "Bernstein et al., arXiv:2002.03432"),
    "sm3": Baseline(
        sm3, (-4, 1), "momentum .9, scalars as vectors of one element", "Anil et al., arXiv:1901.11150"
    ),
    "lars": Baseline(
        lambda rate: optax.lars(rate, weight_decay=0.0, momentum=0.9),
        (-2, 3),
        "trust coefficient .001, momentum .9, no weight decay",
        "You et al., arXiv:1708.03888",
    ),
    "lamb": Baseline(
        lambda rate: optax.lamb(rate, weight_decay=0.0),
        (-6, -1),
        "betas .9 .999, eps 1e-6, no weight decay",
        "You et al., arXiv:1904.00962",
    ),
    "adabelief": Baseline(
        optax.adabelief, (-8, -2), "betas .9 .999, eps 1e-16 twice", "Zhuang et al., arXiv:2010.07468"
    ),
    "adafactor": Baseline(
        optax.adafactor,
        (-6, 0),
        "decay exponent .8, factored from 128 on, times the parameter's scale, update clipped at RMS 1",
        "Shazeer and Stern, arXiv:1804.04235",
    ),
    "adagrad": Baseline(
        optax.adagrad, (-5, 0), "accumulator from .1, eps 1e-7", "Duchi et al., JMLR 12, 2011"
    ),
    "yogi": Baseline(optax.yogi, (-6, -1), "betas .9 .999, eps 1e-3", "Zaheer et al., NeurIPS 2018"),
    "radam": Baseline(optax.radam, (-8, -2), "betas .9 .999, threshold 5", "Liu et al., arXiv:1908.03265"),
    "nadamw": Baseline(
        nadamw,
        (-8, -2),
        "betas .9 .999, eps 1e-8, shared bias correction, weight decay 1e-4 as in adamw",
        "Dozat, 2016; bias correction as in learned_optimization",
    ),
    "muon": Baseline(
        optax.contrib.muon,
        (-6, -1),
        "beta .95, Nesterov, 5 Newton-Schulz steps, scale sqrt(max(1, out/in)); Adam elsewhere, same rate",
        "Jordan, modded-nanogpt, 2024",
    ),
    "lion": Baseline(
        lambda rate: optax.lion(rate, weight_decay=1e-3),
        (-10, -4),
        "betas .9 .99, weight decay 1e-3 times the learning rate",
        "Chen et al., arXiv:2302.06675",
    ),
    "schedule_free_adamw": Baseline(
        _schedule_free,
        (-7, -1),
        "betas .9 .999, no weight decay, no warm-up; evaluated at its average",
        "Defazio et al., arXiv:2405.15682",
        eval_params=optax.contrib.schedule_free_eval_params,
    ),
    "prodigy": Baseline(
        optax.contrib.prodigy,
        (-2, 2),
        "betas .9 .999, first estimate 1e-6; the rate multiplies its own estimate",
        "Mishchenko and Defazio, arXiv:2306.06101",
    ),
    "ademamix": Baseline(
        optax.contrib.ademamix,
        (-8, -2),
        "betas .9 .999 .9999, alpha 5, neither warmed up, no weight decay",
        "Pagliardini et al., arXiv:2409.03137",
    ),
}


def _cosine(rate: Array | float, num_steps: int) -> optax.Schedule:
    return optax.cosine_decay_schedule(rate, num_steps)


# How the learning rate of update t of K follows from the tuned one: the same for all, learned ones included.
SCHEDULES: dict[str, Callable[[Array | float, int], Rate]] = {
    "constant": lambda rate, num_steps: rate,
    "cosine": _cosine,
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A baseline under a schedule, as a function of the learning rate.

    The schedule is given to the rule as its learning rate, so it acts wherever the rule uses that: on the
    step and on decoupled weight decay for most, inside the momentum for lars, in the shrinkage of fromage, in
    the weights of the average for schedule_free_adamw, times its own estimate for prodigy, on both routes of
    muon. With cosine, update ``t`` (0 first) of ``K`` has ``rate (1 + cos(pi t / K)) / 2``: from ``rate`` to
    almost 0.

    Equal rules are equal objects, so the programs compiled for one serve the other.

    Attributes:
      name: a key of :data:`BASELINES`.
      schedule: a key of :data:`SCHEDULES`.
      num_steps: updates of the whole run.

    Raises:
      UserError: an unknown name or schedule (the nearest one is named), or fewer than one step.

    Example:
      >>> tx = Rule("adam", "cosine", num_steps=100)(1e-3)
      >>> Rule("adam", "cosine", num_steps=100) == Rule("adam", "cosine", num_steps=100)
      True
    """

    name: str
    schedule: str = "constant"
    num_steps: int = 1

    def __post_init__(self) -> None:
        """Checks every value."""
        lookup(self.name)
        if self.schedule not in SCHEDULES:
            raise unknown("schedule", self.schedule, SCHEDULES)
        require(self.num_steps >= 1, "num_steps", self.num_steps, "an integer >= 1")

    def __call__(self, learning_rate: Array | float) -> optax.GradientTransformationExtraArgs:
        """Returns the optax rule; the learning rate may be traced."""
        rate = SCHEDULES[self.schedule](learning_rate, self.num_steps)
        return optax.with_extra_args_support(lookup(self.name).make(rate))


def lookup(name: str) -> Baseline:
    """Finds a baseline.

    Raises:
      UserError: there is none of that name; the nearest one is named.

    Example:
      >>> lookup("sgdm").about
      'momentum .9'
    """
    if name not in BASELINES:
        raise unknown("optimizer", name, BASELINES)
    return BASELINES[name]
