"""Orthogonalizations against singular value decompositions in double precision."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx import bench_orthogonalization, cli, naive
from celo_nnx.build import build
from celo_nnx.components.orthogonalization import ORTHOGONALIZATIONS
from celo_nnx.components.orthogonalization.coefficients import COEFFICIENTS
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.interfaces import TensorSpec
from celo_nnx.tensors import Tensors

CASES = [  # shape, matrix axes
    ((24, 40), (0, 1)),
    ((40, 24), (0, 1)),
    ((2, 3, 20, 20), (2, 3)),
    ((12, 3, 2, 20), (0, 3)),
    ((20, 3, 12), (2, 0)),
]


def matrix(shape: tuple[int, ...], axes: tuple[int, int] | None = None, seed: int = 0) -> np.ndarray:
    """A Gaussian tensor whose matrices have singular values from 1 to 1/30."""
    x = np.random.default_rng(seed).normal(size=shape)
    u, s, vt = np.linalg.svd(np.moveaxis(x, axes or (-2, -1), (-2, -1)), full_matrices=False)
    s = np.broadcast_to(np.geomspace(1, 1 / 30, s.shape[-1]), s.shape)
    return np.moveaxis((u * s[..., None, :]) @ vt, (-2, -1), axes or (-2, -1)).astype(np.float32)


def apply(name: str, x: np.ndarray, over: tuple[int, int] | None = None, **settings) -> np.ndarray:
    spec = TensorSpec("w", x.shape, over or (x.ndim - 2, x.ndim - 1), None)
    return np.asarray(ORTHOGONALIZATIONS[name](**settings)(jnp.asarray(x), spec), np.float64)


def on_singular_values(function, x: np.ndarray, axes: tuple[int, int] | None = None) -> np.ndarray:
    """``U f(S) V^T`` in double precision, for ``S`` divided by its norm."""
    axes = axes or (-2, -1)
    x = np.moveaxis(np.asarray(x, np.float64), axes, (-2, -1))
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    s = function(s / np.linalg.norm(s, axis=-1, keepdims=True))
    return np.moveaxis((u * s[..., None, :]) @ vt, (-2, -1), axes)


def scalar_iteration(rows, steps: int):
    def iterate(s: np.ndarray) -> np.ndarray:
        for i in range(steps):
            c0, c1, c2 = rows[min(i, len(rows) - 1)]
            s = c0 * s + c1 * s**3 + c2 * s**5
        return s

    return iterate


def off(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


# --- Newton-Schulz ----------------------------------------------------------------------------------------

SETS = ["celo2", "polar_express", "cubic", (3.0, -3.2, 1.2), ((3.0, -3.2, 1.2), (1.5, -0.5, 0.0))]


@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize("coefficients", SETS, ids=str)
def test_newton_schulz_is_the_polynomial_on_singular_values(coefficients, gram: bool) -> None:
    rows = COEFFICIENTS[coefficients] if isinstance(coefficients, str) else coefficients
    rows = rows if isinstance(rows[0], tuple) else (rows,)
    for shape, axes in CASES:
        x = matrix(shape, axes)
        for steps in (1, 3, 8):
            want = on_singular_values(scalar_iteration(rows, steps), x, axes)
            got = apply("newton_schulz", x, axes, coefficients=coefficients, steps=steps, gram=gram)
            assert off(got, want) < (2e-4 if gram else 5e-6), (shape, steps)


def test_default_is_the_plain_twin() -> None:
    x = matrix((2, 24, 40))
    want = naive.newton_schulz(jnp.asarray(x), (3.4445, -4.7750, 2.0315), 5, 1e-8)
    np.testing.assert_allclose(apply("newton_schulz", x), want, atol=1e-6)
    for name in ("celo2", ("celo2",), "muon"):
        np.testing.assert_array_equal(apply("newton_schulz", x), apply("newton_schulz", x, coefficients=name))


def test_newton_schulz_has_the_derivative_of_the_polynomial() -> None:
    rng = np.random.default_rng(0)
    x, along, weights = matrix((6, 9)), rng.normal(size=(6, 9)), rng.normal(size=(6, 9))
    part, spec = ORTHOGONALIZATIONS["newton_schulz"](steps=3), TensorSpec("w", (6, 9), (0, 1), None)
    iterate = scalar_iteration(((3.4445, -4.7750, 2.0315),), 3)
    after, before = (np.sum(weights * on_singular_values(iterate, x + h * along)) for h in (1e-5, -1e-5))
    for size in (1.0, 1e-3):
        gradient = jax.grad(lambda x: jnp.sum(part(x, spec) * weights))(jnp.float32(size) * x)
        got = np.sum(np.asarray(gradient, np.float64) * along * size)
        np.testing.assert_allclose(got, (after - before) / 2e-5, rtol=1e-3)


def best_quintics(low: float, steps: int, cushion: float) -> list[np.ndarray]:
    """Remez: the odd quintic that is nearest to 1 on [low, high], again and again on what it leaves."""
    high, rows = 1.0, []
    for _ in range(steps):
        start = max(low, cushion * high)
        inner = np.array([3 * start + high, start + 3 * high]) / 4
        for _ in range(100):
            points = np.array([start, *inner, high])
            system = np.stack([points, points**3, points**5, (-1.0) ** np.arange(4)], 1)
            c0, c1, c2, _ = np.linalg.solve(system, np.ones(4))
            root = np.sqrt(9 * c1**2 - 20 * c0 * c2)
            inner = np.sqrt((-3 * c1 + np.array([-root, root])) / (10 * c2))
        row = np.array([c0, c1, c2])
        value = lambda s, row=row: row @ np.array([s, s**3, s**5])  # noqa: E731
        row = row * 2 / (value(low) + value(high))  # centres the interval that is left on 1
        low = row @ np.array([low, low**3, low**5])
        high = 2 - low
        rows.append(row)
    return rows


def test_polar_express_rows_are_the_best_quintics() -> None:
    rows = COEFFICIENTS["polar_express"]
    best = best_quintics(1e-3, 7, 0.02407327424182761)
    for row, want in zip(rows[:6], best, strict=False):
        np.testing.assert_allclose(row * 1.01 ** np.array([1, 3, 5]), want, rtol=1e-11)
    np.testing.assert_allclose(rows[6] * 1.01 ** np.array([1, 3, 5]), best[6], rtol=1e-9)
    assert len(rows) == 8 and rows[7] == (1.875, -1.25, 0.375)  # three derivatives agree at 1


@pytest.mark.parametrize(
    ("name", "steps", "least", "low", "high"),
    [
        ("polar_express", 5, 1e-3, 0.84, 1.13),
        ("polar_express", 7, 1e-3, 1 - 1e-5, 1 + 1e-5),
        ("polar_express", 9, 1e-3, 1 - 1e-12, 1 + 1e-12),
        ("celo2", 5, 0.002, 0.68, 1.203),
        ("celo2", 30, 1e-3, 0.68, 1.135),
        ("cubic", 12, 0.02, 0.99, 1.0),
    ],
)
def test_where_singular_values_end(name: str, steps: int, least: float, low: float, high: float) -> None:
    ends = scalar_iteration(COEFFICIENTS[name], steps)(np.geomspace(least, 1, 10_001))
    assert low <= ends.min() and ends.max() <= high


def test_safety_factor_bears_singular_values_above_the_norm() -> None:
    ends = scalar_iteration(COEFFICIENTS["polar_express"], 8)(np.linspace(1, 1.01, 1001))
    np.testing.assert_allclose(ends, 1, atol=1e-12)


def low_rank() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.normal(size=(32, 2)) @ rng.normal(size=(2, 48))).astype(np.float32)


@pytest.mark.parametrize("coefficients", ["celo2", "polar_express", "cubic"])
def test_gram_equals_plain_where_rounding_is_harsh(coefficients: str) -> None:
    """A Gram matrix of low rank has negative eigenvalues, which would grow without bound."""
    steep = bench_orthogonalization.spectra((32, 48))["decaying"]
    for x, steps in ((low_rank(), 5), (low_rank(), 8), (steep, 8), (steep, 30)):
        plain = apply("newton_schulz", x, coefficients=coefficients, steps=steps)
        assert off(apply("newton_schulz", x, coefficients=coefficients, steps=steps, gram=True), plain) < 1e-2
    many = apply("newton_schulz", low_rank(), coefficients=coefficients, steps=40, gram=True)
    assert np.linalg.norm(many, 2) < 1.5


@pytest.mark.parametrize("coefficients", ["celo2", "polar_express", "cubic"])
def test_bfloat16_rounds_but_stays_near(coefficients: str) -> None:
    for x in (matrix((24, 40)), matrix((40, 24)), matrix((3, 20, 20))):
        want = apply("newton_schulz", x, coefficients=coefficients)
        got = apply("newton_schulz", x, coefficients=coefficients, dtype="bfloat16")
        assert 1e-3 < off(got, want) < 5e-2
    many = apply("newton_schulz", low_rank(), coefficients=coefficients, dtype="bfloat16", steps=40)
    assert np.linalg.norm(many, 2) < 1.25  # noise comes up to the rest, not above it


# --- SVD --------------------------------------------------------------------------------------------------


def test_svd_is_the_polar_factor() -> None:
    for shape, axes in CASES:
        x = matrix(shape, axes)
        assert off(apply("svd", x, axes), on_singular_values(np.ones_like, x, axes)) < 5e-6
    steep = bench_orthogonalization.spectra((40, 24))["decaying"]
    assert off(apply("svd", steep), on_singular_values(np.ones_like, steep)) < 1e-4


def test_svd_cuts_what_is_zero_in_float32() -> None:
    x = low_rank()
    want = on_singular_values(lambda s: (s > 1e-6).astype(float), x)
    assert off(apply("svd", x), want) < 1e-5
    threshold = 4 * 2.0**-23
    diagonal = np.diag([1.0, 2 * threshold, 0.5 * threshold, 0.0]).astype(np.float32)
    np.testing.assert_allclose(apply("svd", diagonal), np.diag([1, 1, 0, 0]), atol=1e-6)


# --- rows and columns -------------------------------------------------------------------------------------


def test_rows_and_columns_get_unit_mean_square() -> None:
    x = matrix((12, 3, 20), (0, 2)).astype(np.float64)
    for axes, over in (("rows", 2), ("columns", 0)):
        want = x / np.sqrt(np.mean(x * x, over, keepdims=True))
        np.testing.assert_allclose(apply("axis_normalized", x, (0, 2), axes=axes), want, rtol=1e-5)


def test_both_alternates_and_converges() -> None:
    x = matrix((12, 20)).astype(np.float64)
    want = x
    for _ in range(2):
        want = want / np.sqrt(np.mean(want**2, 1, keepdims=True))
        want = want / np.sqrt(np.mean(want**2, 0, keepdims=True))
    np.testing.assert_allclose(apply("axis_normalized", x, axes="both", steps=2), want, rtol=1e-5)
    y = apply("axis_normalized", x, axes="both", steps=50)
    for axis in (0, 1):
        np.testing.assert_allclose(np.mean(y * y, axis), 1, rtol=1e-5)


def test_rows_are_the_parameters_own_where_the_rule_sees_it_transposed() -> None:
    spec = Tensors().specs({"w": (24, 3)})["w"]
    assert spec.shape == (3, 24) and spec.matrix == (1, 0)
    x = jnp.asarray(matrix((24, 3)))
    y = ORTHOGONALIZATIONS["axis_normalized"](axes="rows")(x.T, spec).T
    np.testing.assert_allclose(jnp.mean(y * y, 1), 1, rtol=1e-5)


def test_a_zero_row_stays_zero() -> None:
    x = matrix((4, 6))
    x[1] = 0
    for axes in ("rows", "columns", "both"):
        y = apply("axis_normalized", x, axes=axes)
        assert not y[1].any() and np.isfinite(y).all() and y[0].any()


@pytest.mark.parametrize("name", ["newton_schulz", "axis_normalized"])
def test_the_derivative_at_zero_is_zero_and_elsewhere_as_it_was(name: str) -> None:
    # Reverse mode passes here wherever a step is exactly zero: a dead tensor, or a row of one.
    part, spec = ORTHOGONALIZATIONS[name](), TensorSpec("w", (2, 4, 6), (1, 2), None)
    x, weights = jnp.asarray(matrix((2, 4, 6))), jnp.asarray(matrix((2, 4, 6), seed=1))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(part(x, spec) * weights)))
    dead = gradient(x.at[1].set(0.0))
    assert not dead[1].any()
    np.testing.assert_allclose(dead[0], gradient(x)[0], rtol=1e-4, atol=1e-6)
    assert np.all(gradient(x)[1] != 0)


# --- all of them ------------------------------------------------------------------------------------------

VARIED = [(name, {}) for name in ORTHOGONALIZATIONS]
VARIED += [("newton_schulz", {"gram": True}), ("newton_schulz", {"dtype": "bfloat16"})]
VARIED += [("newton_schulz", {"coefficients": "polar_express", "steps": 8})]
VARIED += [("axis_normalized", {"axes": axes}) for axes in ("columns", "both")]


@pytest.mark.parametrize(("name", "settings"), VARIED, ids=str)
def test_extremes(name: str, settings: dict) -> None:
    x = matrix((3, 12, 20))
    assert not apply(name, np.zeros_like(x), **settings).any()
    if name != "identity":  # powers of two, so rounding is the same
        want = apply(name, x, **settings)
        for scale in (2.0**100, 2.0**40):
            np.testing.assert_allclose(apply(name, x * np.float32(scale), **settings), want, atol=2e-5)
    vector = jnp.arange(5.0)
    assert ORTHOGONALIZATIONS[name](**settings)(vector, TensorSpec("b", (5,), None, None)) is vector


@pytest.mark.parametrize(("name", "settings"), VARIED, ids=str)
def test_matrices_of_a_batch_do_not_meet(name: str, settings: dict) -> None:
    x = matrix((3, 12, 20))
    x[1] *= 1e6
    each = np.stack([apply(name, one, **settings) for one in x])
    np.testing.assert_allclose(apply(name, x, **settings), each, rtol=1e-3, atol=1e-4)


# --- config -----------------------------------------------------------------------------------------------

SLOT = "optimizer.orthogonalization"


def built(*overrides: str):
    return build(load("celo2", [f"{SLOT}.{o}" for o in overrides]).optimizer).orthogonalization


@pytest.mark.parametrize(
    ("text", "same_as"),
    [
        ("polar_express", "polar_express"),
        ("cubic", "cubic"),
        ("2,-1.5,0.5", (2.0, -1.5, 0.5)),
        ("((2, -1.5, 0.5), [1.5, -0.5, 0])", ((2.0, -1.5, 0.5), (1.5, -0.5, 0.0))),
    ],
)
def test_coefficients_from_the_command_line(text: str, same_as) -> None:
    part = built(f"coefficients={text}", "steps=3")
    assert part.coefficients == same_as
    x = matrix((12, 20))
    got = part(jnp.asarray(x), TensorSpec("w", x.shape, (0, 1), None))
    np.testing.assert_array_equal(got, apply("newton_schulz", x, coefficients=same_as, steps=3))


def test_a_name_survives_another_round_and_can_be_replaced_by_numbers() -> None:
    config = load("celo2", [f"{SLOT}.coefficients=polar_express"])
    stored = json.loads(json.dumps(config.to_dict()))["optimizer"]  # tuples become lists
    assert build(stored).orthogonalization.coefficients == "polar_express"
    again = load(config, [f"{SLOT}.coefficients=2,-1.5,0.5"])
    assert build(again.optimizer).orthogonalization.coefficients == (2.0, -1.5, 0.5)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("newton_schulz", {"coefficients": "polar_expres"}, "did you mean 'polar_express'"),
        ("newton_schulz", {"coefficients": ("muons",)}, "did you mean 'muon'"),
        ("newton_schulz", {"coefficients": ()}, "must be three numbers, rows of three numbers, or a name"),
        ("newton_schulz", {"coefficients": 3.0}, "coefficients = 3.0 is out of range"),
        ("newton_schulz", {"coefficients": (1.5, -0.5)}, r"coefficients = \(1.5, -0.5\) is out of range"),
        ("newton_schulz", {"coefficients": (1.5, "a", 0)}, "is out of range"),
        ("newton_schulz", {"coefficients": (1.5, float("nan"), 0)}, "is out of range"),
        ("newton_schulz", {"coefficients": ("cubic", "muon")}, "is out of range"),
        ("newton_schulz", {"coefficients": ((1.5, -0.5, 0), (1.5, -0.5))}, "is out of range"),
        ("newton_schulz", {"coefficients": ((1.5, -0.5, 0), 3)}, "is out of range"),
        ("newton_schulz", {"steps": 101}, "steps = 101 is out of range"),
        ("newton_schulz", {"eps": 0.0}, "eps = 0.0 is out of range"),
        ("newton_schulz", {"dtype": "bfloat"}, "did you mean 'bfloat16'"),
        ("newton_schulz", {"dtype": "bfloat16", "gram": True}, "gram = True diverges"),
        ("axis_normalized", {"axes": "row"}, "did you mean 'rows'"),
        ("axis_normalized", {"steps": 0}, "steps = 0 is out of range"),
        ("axis_normalized", {"eps": -1.0}, "eps = -1.0 is out of range"),
    ],
)
def test_mistakes(name: str, settings: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        ORTHOGONALIZATIONS[name](**settings)
    assert "\n" not in str(error.value)


def test_mistake_is_told_with_its_place() -> None:
    with pytest.raises(UserError, match="optimizer.orthogonalization: unknown coefficients 'cubik'"):
        built("coefficients=cubik")


def test_svd_in_a_whole_update() -> None:
    """The hand-made rule hands RMS-normalized momentum on: the first step is its polar factor."""
    few = "optimizer.features.groups=gradient,momentum"  # for a quick compilation
    opt = build(load("celo2", [f"{SLOT}.kind=svd", few]).optimizer, theta_init={"kind": "hand_made"})
    params = {"w": jnp.zeros((24, 3)), "v": jnp.zeros((8, 20))}
    grads = {name: jnp.asarray(matrix(p.shape)) for name, p in params.items()}
    updates, _ = jax.jit(lambda g, p: opt.update(g, opt.init(p), p, learning_rate=1.0))(grads, params)
    for name, grad in grads.items():
        polar = on_singular_values(np.ones_like, np.asarray(grad))
        want = -polar / np.sqrt(np.mean(polar**2))  # output normalization
        assert off(np.asarray(updates[name]), want) < 1e-3


def test_the_plain_twin_refuses_what_it_does_not_have() -> None:
    with pytest.raises(UserError, match="orthogonalization of the plain twin 'svd'"):
        naive.from_config(load("celo2", [f"{SLOT}.kind=svd"]).optimizer)


# --- the table --------------------------------------------------------------------------------------------


def test_errors_against_a_rotation() -> None:
    turn = lambda a: np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])  # noqa: E731
    got = bench_orthogonalization.errors(2 * turn(0.3), turn(0.1))
    assert got["angle"] == pytest.approx(0.2) and got["sv_min"] == pytest.approx(2.0)
    assert got["distance"] == pytest.approx(np.linalg.norm(2 * turn(0.2) - np.eye(2)) / np.sqrt(2))


def test_bench_prints_a_row_for_each(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = bench_orthogonalization.orthogonalization
    monkeypatch.setattr(bench_orthogonalization, "orthogonalization", lambda: rows([(2, 6, 8)], repeats=1))
    assert cli.main(["bench", "orthogonalization"]) == 0
    table = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {row["part"] for row in table} == set(ORTHOGONALIZATIONS)
    assert table[0]["part"] == "newton_schulz" and table[0]["settings"] == {} and table[0]["ratio"] == 1
    found = {(row["part"], json.dumps(row["settings"])): row for row in table}
    assert len(found) == len(bench_orthogonalization.SETTINGS)
    for row in table:
        assert row["shape"] == [2, 6, 8] and row["ms_median"] >= 0
        if row["part"] == "svd":
            for spectrum in ("gaussian", "decaying"):
                assert row[f"distance_{spectrum}"] < 1e-4
                assert row[f"sv_min_{spectrum}"] == row[f"sv_max_{spectrum}"] == 1.0
    x = jax.device_get(bench_orthogonalization.spectra((2, 6, 8))["gaussian"])
    singular = np.linalg.svd(x, compute_uv=False)
    assert found["identity", "{}"]["sv_max_gaussian"] == pytest.approx(singular.max(), rel=5e-3)
