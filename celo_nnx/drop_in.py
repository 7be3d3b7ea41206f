"""Learned optimizers in one call, in the place of ``optax.adamw`` or ``optax.contrib.muon``.

========================  ==================================================================================
``celo2``                 Matrices are orthogonalized as in Muon; biases, scales, embeddings take Adam at 20
                          times the learning rate. The first choice for networks of matrices: transformers,
                          MLPs, convolutions. Costs what Muon costs, products in float32 or bfloat16 alike.
``celo2_base``            The learned rule alone, one rule for every tensor. No matrix products: for models
                          that are mostly embeddings or very wide, where Newton-Schulz costs too much.
``celo``                  A learned schedule too: nothing to tune, but it must know ``num_steps`` and see the
                          loss (``value=``). For runs whose length is known.
========================  ==================================================================================

Weights: meta-trained ones come with the package and are the default; ``celo_nnx.weights.card(name)`` says
what they are, and ``experiments/weights/README.md`` where they are good and where they fail.

Learning rate: the RMS of a matrix's step, whatever the gradient's scale. The default is what the cards
recommend for a constant rate on small networks; search half-decades around it.
Weight decay is decoupled and multiplied by the learning rate, as in ``optax.adamw``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from celo_nnx.config import load_optimizer
from celo_nnx.errors import UserError, require, unknown
from celo_nnx.optimizer import LearnedOptimizer
from celo_nnx.weights import HAND_MADE, locate, names

Array = jax.Array
PyTree = Any
Schedule = Callable[[Array], Array]


def celo2(
    learning_rate: float | Array | Schedule = 1e-3,
    weight_decay: float | Array = 0.0,
    *,
    weights: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    num_steps: int | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    dimensions: PyTree | Callable[[PyTree], PyTree] | None = None,
    shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
    state_dtype: str = "float32",
    orthogonalization_dtype: str = "float32",
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Celo2 (ICLR 2026): a learned rule and Newton-Schulz on matrices, Adam on the other tensors.

    ``p <- p - eta (y + wd p)`` with ``RMS(y) = 1`` over each matrix (OPTIMIZERS sections 4 and 5); Adam's
    ``eta`` is 20 times as large.

    Args:
      learning_rate: the RMS of a step, or an optax schedule of it.
      weight_decay: decoupled, times the learning rate; 0.1 is usual for language models.
      weights: theta as a tree, a ``.safetensors`` file, a run folder of ``celo-nnx train``, or a name: by
        default the package's of this rule; ``"hand_made"`` makes it Muon with exponential-average momentum.
      num_steps: length of the run in updates; this rule does not need it.
      mask: Python or numpy booleans like the parameters, or a function of them: which tensors are decayed.
      dimensions: ``optax.contrib.MuonDimensionNumbers`` or None (Adam) for each tensor, or a function of
        the parameters: which axes are the matrix. By default kernels of nnx and linen are recognised; see
        :meth:`~celo_nnx.optimizer.LearnedOptimizer.routing_table`.
      shardings: ``jax.sharding.NamedSharding`` of each parameter, as a tree like them or a function of them:
        the state is split over the mesh likewise, and each device updates its share. Start large states under
        jit: ``jax.jit(tx.init)(params)``.
      state_dtype: ``"float32"`` (16 bytes a parameter of a matrix) or ``"bfloat16"`` (8, stochastically
        rounded; a step differs by about 1 % of its RMS).
      orthogonalization_dtype: ``"float32"``; or ``"bfloat16"`` for what Newton-Schulz's matrix products read,
        as Muon in bfloat16: much faster where a GPU or TPU has units for it.
      diagnostics: keep per-tensor figures in the state; see :func:`celo_nnx.diagnostics`.

    Returns:
      An optax transformation. Parameters and gradients may be float32, bfloat16 or float16.

    Raises:
      UserError: weights that cannot be read or do not fit, or a value out of range; at ``init``, an integer
        or complex parameter; at ``update``, a gradient tree that does not match. The tensor is named.

    Example:
      >>> import jax.numpy as jnp, optax, celo_nnx
      >>> tx = celo_nnx.celo2(optax.cosine_decay_schedule(1e-3, 1000), weight_decay=0.1)
      >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)

    Source: Celo2, ICLR 2026; the route and the constants are OPTIMIZERS section 5.
    """
    return _transformation("celo2", **locals())


def celo2_base(
    learning_rate: float | Array | Schedule = 3.16e-3,
    weight_decay: float | Array = 0.0,
    *,
    weights: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    num_steps: int | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    dimensions: PyTree | Callable[[PyTree], PyTree] | None = None,
    shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
    state_dtype: str = "float32",
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Celo2-base (ICLR 2026): the learned rule for every tensor, no orthogonalization.

    The step of every tensor is normalized to ``RMS(y) = 1``; a scalar moves by the learning rate.

    Args:
      learning_rate, weight_decay, weights, num_steps, mask, dimensions, shardings, state_dtype, diagnostics:
        as in :func:`celo2`; ``"hand_made"`` steps along RMS-normalized momentum here, and a tensor whose
        dimensions are None is looked at as by default.

    Returns:
      An optax transformation.

    Raises:
      UserError: as in :func:`celo2`.

    Example:
      >>> import jax.numpy as jnp, celo_nnx
      >>> tx = celo_nnx.celo2_base(3e-3)
      >>> state = tx.init({"w": jnp.ones((8, 4))})

    Source: OPTIMIZERS section 4.
    """
    return _transformation("celo2_base", **locals())


def celo(
    learning_rate: float | Array | Schedule = 1e-3,
    weight_decay: float | Array = 0.0,
    *,
    num_steps: int,
    weights: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    dimensions: PyTree | Callable[[PyTree], PyTree] | None = None,
    shardings: PyTree | Callable[[PyTree], PyTree] | None = None,
    state_dtype: str = "float32",
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Celo (TMLR 2025): a learned rule whose learning rate a learned LSTM decides from time and loss.

    Args:
      learning_rate: what the learned rate, about 0.1 to 1, and the parameter's RMS multiply. Leave it at the
        published 1e-3.
      weight_decay, mask, dimensions, shardings, state_dtype, diagnostics: as in :func:`celo2`.
      num_steps: length of the run in updates.
      weights: as in :func:`celo2`; published ones are read by ``celo-nnx import``. ``"hand_made"`` steps
        along RMS-normalized momentum at a constant rate.

    Returns:
      An optax transformation; its update needs the loss: ``tx.update(grads, state, params, value=loss)``.

    Raises:
      UserError: as in :func:`celo2`; a missing ``value``.

    Example:
      >>> import jax.numpy as jnp, celo_nnx
      >>> tx = celo_nnx.celo(num_steps=1000)
      >>> params = {"w": jnp.ones((8, 4))}
      >>> updates, state = tx.update(params, tx.init(params), params, value=jnp.float32(1.0))

    Source: OPTIMIZERS section 2.
    """
    return _transformation("celo", **locals())


def _transformation(
    variant: str, weights: Any, state_dtype: str, orthogonalization_dtype: str = "", **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    overrides = (f"optimizer.state.dtype={state_dtype}",)
    if orthogonalization_dtype:
        overrides += (f"optimizer.orthogonalization.dtype={orthogonalization_dtype}",)
    theta = weights if isinstance(weights, Mapping) else None
    path = None
    if weights is not None and theta is None:
        good = isinstance(weights, (str, os.PathLike))
        require(good, "weights", weights, "a theta, a file, a run folder or a name")
        path = os.fspath(weights)
    if path is not None and not os.path.exists(path):
        if os.sep in path or path.endswith((".safetensors", ".state")):
            raise UserError(f"no weights at {path}: neither a file nor a run folder is there")
        if path not in (HAND_MADE, *names()):
            raise unknown("weights", path, (HAND_MADE, *names()))
    optimizer = _built(variant, overrides, path)
    if theta is not None:
        optimizer = optimizer.with_theta(theta)
    return optimizer.as_optax(**arguments)


@functools.lru_cache(maxsize=16)
def _cached(variant: str, overrides: tuple[str, ...], path: str | None, stamp: float) -> LearnedOptimizer:
    # A transformation may be made inside jit (optax.inject_hyperparams does it): theta must be real there.
    with jax.ensure_compile_time_eval():
        return load_optimizer(variant, overrides, weights=path)


def _built(variant: str, overrides: tuple[str, ...], path: str | None) -> LearnedOptimizer:
    """Returns the optimizer; made anew where the weights' file has changed."""
    if path in (None, HAND_MADE):
        return _cached(variant, overrides, path, 0.0)
    folder = str(locate(path))
    file = os.path.join(folder, "theta.safetensors") if os.path.isdir(folder) else folder
    stamp = os.path.getmtime(file) if os.path.exists(file) else 0.0
    return _cached(variant, overrides, os.path.abspath(folder), stamp)
