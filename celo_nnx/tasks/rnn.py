"""A recurrent language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from celo_nnx.interfaces import Array
from celo_nnx.tasks.fields import ACTIVATIONS, check_names
from celo_nnx.tasks.language import LanguageTask, look_up

Activation = Callable[[Array], Array]
State = tuple[Array, Array]


def _simple(given: Array, recurrent: Array, state: State, f: Activation) -> State:
    h, c = state
    return f(given + h @ recurrent), c


def _gru(given: Array, recurrent: Array, state: State, f: Activation) -> State:
    h, c = state
    r, z, n = jnp.split(given, 3, axis=-1)
    from_r, from_z, from_n = jnp.split(h @ recurrent, 3, axis=-1)
    z = jax.nn.sigmoid(z + from_z)
    return (1 - z) * f(n + jax.nn.sigmoid(r + from_r) * from_n) + z * h, c


def _lstm(given: Array, recurrent: Array, state: State, f: Activation) -> State:
    h, c = state
    i, o, forget, new = jnp.split(given + h @ recurrent, 4, axis=-1)
    c = jax.nn.sigmoid(forget + 1.0) * c + jax.nn.sigmoid(i) * f(new)
    return jax.nn.sigmoid(o) * f(c), c


# name -> (multiple of the width that a step computes, the step)
CELLS: dict[str, tuple[int, Callable[[Array, Array, State, Activation], State]]] = {
    "simple": (1, _simple),
    "gru": (3, _gru),
    "lstm": (4, _lstm),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecurrentLM(LanguageTask):
    """Embedding, recurrent layers that start each slice at zero, linear.

    With ``a = W x + b`` and ``u = U h``, split where there are several, and the activation f:

    - ``simple``: ``h' = f(a + u)``;
    - ``gru``: ``h' = (1 - z) f(a_n + s(a_r + u_r) u_n) + z h`` with ``z = s(a_z + u_z)``;
    - ``lstm``: ``c' = s(a_f + u_f + 1) c + s(a_i + u_i) f(a_g + u_g)`` and ``h' = s(a_o + u_o) f(c')``.

    A layer's output is normalized before the next one reads it.

    Attributes:
      cell: a key of :data:`CELLS`.

    Example:
      >>> params, _ = RecurrentLM(vocabulary=5, width=8, cell="lstm").init(jax.random.key(0))
      >>> params["layer_0"]["recurrent"]["kernel"].shape
      (8, 32)
    """

    cell: str = "gru"

    def __post_init__(self) -> None:
        """Checks every value."""
        super().__post_init__()
        check_names(self, cell=CELLS)

    def new_model(self, rngs: nnx.Rngs) -> nnx.Module:
        """Builds the network."""
        return _Net(self, rngs)


class _Layer(nnx.Module):
    def __init__(self, task: RecurrentLM, rngs: nnx.Rngs) -> None:
        self.task = task
        multiple = CELLS[task.cell][0]
        self.given = task.linear(task.width, multiple * task.width, rngs)
        self.recurrent = task.linear(task.width, multiple * task.width, rngs, use_bias=False)
        self.norm = task.norm(task.width, rngs)

    def __call__(self, x: Array) -> Array:
        step, recurrent = CELLS[self.task.cell][1], self.recurrent.kernel[...]
        f = ACTIVATIONS[self.task.activation]

        def next_state(state: State, given: Array) -> tuple[State, Array]:
            state = step(given, recurrent, state, f)
            return state, state[0]

        zero = jnp.zeros(x[:, 0].shape, x.dtype)
        _, h = lax.scan(next_state, (zero, zero), self.given(x).swapaxes(0, 1))
        return self.norm(h.swapaxes(0, 1))


class _Net(nnx.Module):
    def __init__(self, task: RecurrentLM, rngs: nnx.Rngs) -> None:
        self.depth = task.depth
        self.embed = task.embed(rngs)
        for i in range(task.depth):
            setattr(self, f"layer_{i}", _Layer(task, rngs))
        self.head = task.linear(task.width, task.vocabulary, rngs)

    def __call__(self, tokens: Array) -> Array:
        x = look_up(self.embed, tokens)
        for i in range(self.depth):
            x = getattr(self, f"layer_{i}")(x)
        return self.head(x)
