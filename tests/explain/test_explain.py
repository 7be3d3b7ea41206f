"""What ``explain`` finds equals what is known of a hand-made rule, and what plain NumPy and optax compute."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from celo_nnx import load_optimizer
from celo_nnx.build import build
from celo_nnx.cli import main
from celo_nnx.config import load
from celo_nnx.evaluation import plots
from celo_nnx.explain import record as records
from celo_nnx.explain.page import COLUMNS
from celo_nnx.explain.record import Recording, compared, digits, record
from celo_nnx.explain.responses import plane_labels, responses, weights
from celo_nnx.explain.subject import find, first_layer
from celo_nnx.interfaces import Family
from celo_nnx.optimizer import LearnedOptimizer

GROUPS = ("gradient", "parameter", "momentum", "row")  # a bias has no rows
SMALL = [f"optimizer.features.groups={','.join(GROUPS)}", "optimizer.update_rule.hidden=(4,4)"]
STEPS, SEEDS, RATE = 4, 2, 0.01


@pytest.fixture(scope="module")
def network() -> Family:
    return digits(hidden=(4,), batch_size=8)


@pytest.fixture(scope="module")
def hand_made(network: Family) -> tuple[LearnedOptimizer, Recording]:
    """The rule that steps along normalized momentum of decay 0.9."""
    optimizer = load_optimizer("celo2_base", SMALL, weights="hand_made")
    return optimizer, record(optimizer, network, steps=STEPS, seeds=SEEDS, learning_rate=RATE)


@pytest.fixture(scope="module")
def drawn(network: Family) -> tuple[LearnedOptimizer, Recording]:
    """A rule of which nothing is known."""
    optimizer = build(load("celo2_base", SMALL).optimizer, jax.random.key(3))
    return optimizer, record(optimizer, network, steps=STEPS, seeds=SEEDS, learning_rate=RATE)


def mlp(optimizer: LearnedOptimizer, groups: list[str], planes: np.ndarray) -> np.ndarray:
    """The direction of the MLP in NumPy; planes ``[..., planes, n]``."""
    theta = jax.tree.map(lambda x: np.asarray(x, np.float64), optimizer.theta["update_rule"])
    x = np.swapaxes(planes, -1, -2) @ np.concatenate([theta["w0"][g] for g in groups]) + theta["b0"]
    x = np.maximum(np.maximum(x, 0) @ theta["w1"] + theta["b1"], 0)
    return (x @ theta["w2"] + theta["b2"])[..., 0]


def test_a_rule_along_momentum_is_linear_in_it_and_blind_to_the_rest(
    hand_made: tuple[LearnedOptimizer, Recording],
) -> None:
    optimizer, recording = hand_made
    curves = responses(optimizer, recording, points=5, samples=7)
    assert [(r.group, r.label) for r in curves] == [
        ("gradient", ""),
        ("parameter", ""),
        *(("momentum", d) for d in ("0.9", "0.99", "0.999")),
        *(("row", d) for d in ("0.9", "0.99", "0.999")),
    ]
    seen = [x for x in recording.tensors.values() if x.planes.shape[1] == 8]
    assert len(seen) == 2 and len(recording.tensors) == 4
    unit = np.sqrt(np.mean(np.concatenate([x.raw.ravel() for x in seen]) ** 2))
    for r in curves:
        linear = (r.x - r.at) / unit if (r.group, r.plane) == ("momentum", 0) else np.zeros(5)
        np.testing.assert_allclose(r.change, np.broadcast_to(linear, (7, 5)), atol=1e-5)
        np.testing.assert_allclose(r.others_zero, linear, atol=1e-5)
        assert r.x[0] < r.at < r.x[-1]
    for tensor in recording.tensors.values():
        np.testing.assert_allclose(tensor.raw, tensor.planes[:, 2], atol=1e-6)
        for group in GROUPS:
            alone = 1.0 if group == "momentum" else 0.0
            np.testing.assert_allclose(tensor.change[group], np.full((SEEDS, STEPS), alone), atol=1e-5)
            np.testing.assert_allclose(tensor.raw_change[group], np.full((1, STEPS), alone), atol=1e-5)
            np.testing.assert_allclose(tensor.cosine[group], 1 - tensor.change[group], atol=1e-5)
        np.testing.assert_allclose(records.cosine(tensor.raw, tensor.against["momentum"]), 1.0, atol=1e-5)
    np.testing.assert_array_equal(recording.losses_without["gradient"], recording.losses)
    assert np.abs(recording.losses_without["momentum"] - recording.losses)[:, 2:].min() > 1e-4
    sizes = {w.group: w.rms for w in weights(optimizer)}
    np.testing.assert_allclose(sizes["momentum"], [np.sqrt(2 / 4), 0, 0], atol=1e-6)
    assert not sizes["row"].any() and not sizes["gradient"].any()


def test_the_hand_made_celo2_takes_muons_step(network: Family) -> None:
    optimizer = load_optimizer("celo2", SMALL, weights="hand_made")
    recording = record(optimizer, network, steps=3, seeds=1, learning_rate=RATE)
    assert sorted(recording.tensors) == ["linear_0/w", "linear_1/w"]  # biases take Adam
    for tensor in recording.tensors.values():
        np.testing.assert_allclose(records.cosine(tensor.step, tensor.aligned["momentum"]), 1.0, atol=1e-4)
        assert records.cosine(tensor.step, tensor.raw).max() < 0.99
        np.testing.assert_allclose(np.sqrt(np.mean(tensor.step**2, axis=1)), RATE, rtol=1e-3)


def test_what_is_recorded_is_what_numpy_computes(drawn: tuple[LearnedOptimizer, Recording]) -> None:
    optimizer, recording = drawn
    for path, tensor in recording.tensors.items():
        groups = [name for name, _ in tensor.groups]
        assert groups == [g for g in GROUPS if g != "row" or path.endswith("/w")]
        planes = tensor.planes.astype(np.float64)
        squares = np.mean(
            planes**2, axis=-1
        )  # below 1 only where a plane is as small as the normalization's eps
        assert squares.max() < 1.001 and (path != "linear_0/w" or squares[:, 0].min() > 0.99)
        raw = mlp(optimizer, groups, planes)
        np.testing.assert_allclose(tensor.raw, raw, atol=1e-5)
        scaled = raw / np.sqrt(np.mean(raw**2, axis=1, keepdims=True))
        np.testing.assert_allclose(tensor.step, RATE * scaled, atol=1e-6)
        start = 0
        for group, width in tensor.groups:
            blind = planes.copy()
            blind[:, start : start + width] = 0
            other = mlp(optimizer, groups, blind)
            expected = np.linalg.norm(other - raw, axis=1) / np.linalg.norm(raw, axis=1)
            np.testing.assert_allclose(tensor.raw_change[group][0], expected, rtol=1e-3)
            angle = np.sum(other * raw, 1) / np.linalg.norm(other, axis=1) / np.linalg.norm(raw, axis=1)
            np.testing.assert_allclose(tensor.cosine[group][0], angle, atol=1e-4)
            start += width
        grads = tensor.against["gradient"].astype(np.float64)
        momentum, m, v = np.zeros_like(grads[0]), 0.0, 0.0
        for t, grad in enumerate(grads):
            momentum, m, v = 0.9 * momentum + 0.1 * grad, 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
            adam = m / (1 - 0.9 ** (t + 1)) / (np.sqrt(v / (1 - 0.999 ** (t + 1))) + 1e-8)
            np.testing.assert_allclose(tensor.against["momentum"][t], momentum, rtol=1e-4, atol=1e-9)
            np.testing.assert_allclose(tensor.against["adam"][t], adam, rtol=1e-3, atol=1e-4)
        np.testing.assert_array_equal(tensor.against["sign"], np.sign(grads))


def test_responses_are_those_of_the_mlp(drawn: tuple[LearnedOptimizer, Recording]) -> None:
    optimizer, recording = drawn
    curves = responses(optimizer, recording, points=6, samples=9)
    tensor = recording.tensors["linear_0/w"]
    groups, seen = (
        [name for name, _ in tensor.groups],
        [x for x in recording.tensors.values() if x.planes.shape[1] == 8],
    )
    unit = np.sqrt(np.mean(np.concatenate([x.raw.ravel() for x in seen]).astype(np.float64) ** 2))
    values = np.concatenate([np.moveaxis(x.planes, 1, 0).reshape(8, -1) for x in seen], axis=1)
    for j, r in enumerate(curves):
        np.testing.assert_allclose([r.x[0], r.x[-1]], np.percentile(values[j], (1, 99)), rtol=1e-4)
        alone = np.zeros((8, 7))
        alone[j] = [r.at, *r.x]
        expected = mlp(optimizer, groups, alone)
        np.testing.assert_allclose(r.others_zero, (expected[1:] - expected[0]) / unit, atol=1e-5)
        # Each curve is that of some recorded element: the nearest of all is it.
        moved = np.repeat(values[:, None], 7, axis=1)
        moved[j] = np.array([r.at, *r.x])[:, None]
        every = np.stack([mlp(optimizer, groups, moved[:, k]) for k in range(7)])
        every = ((every[1:] - every[:1]) / unit).T
        nearest = [np.abs(every - curve).max(axis=1).min() for curve in r.change]
        assert max(nearest) < 1e-4


def test_losses_are_those_of_training_through_optax(
    network: Family, drawn: tuple[LearnedOptimizer, Recording]
) -> None:
    optimizer, recording = drawn
    blind = optimizer.theta
    blind["update_rule"]["w0"]["momentum"] = jnp.zeros_like(blind["update_rule"]["w0"]["momentum"])
    for rule, losses in (
        (optimizer, recording.losses),
        (optimizer.with_theta(blind), recording.losses_without["momentum"]),
    ):
        tx = rule.as_optax(learning_rate=RATE)
        _, init_key, self_key = jax.random.split(jax.random.key(1), 3)
        params, _ = network.task.init(init_key)
        state, update = tx.init(params), jax.jit(tx.update)
        for step in range(STEPS):
            key = jax.random.split(jax.random.fold_in(self_key, step))[0]
            batch = network.task.draw(network.train, key, 0, len(network.train["y"]))
            objective = lambda p, batch=batch: network.task.loss(p, {}, None, batch)[0]  # noqa: E731
            loss, grads = jax.value_and_grad(objective)(params)
            assert loss == pytest.approx(losses[1, step], abs=1e-4)
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
    assert compared(np.zeros((2, 1, 3)))["cosine"] == 1 and compared(np.zeros((2, 1, 3)))["change"] == 0


@pytest.fixture(scope="module")
def page(real_run: tuple[Path, str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run's theta, by the command."""
    out = tmp_path_factory.mktemp("explained") / "a.html"
    assert (
        main(["explain", str(real_run[0]), "--steps", "6", "--learning-rate", "0.01", "--out", str(out)]) == 0
    )
    return out


def test_the_page_shows_every_feature_and_is_self_contained(page: Path) -> None:
    text = page.read_text("utf-8")
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings[:2] == ["The step along each feature", "First-layer weights"] and len(headings) == 5
    assert text.count("<svg") == 5 and "nan" not in re.sub(r"<svg.*?</svg>", "", text, flags=re.DOTALL)
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for group in ("gradient", "momentum"):
        assert all(f">{group}" in pictures[i] for i in (0, 1, 4)) and f"<td>{group}</td>" in text
    assert "--steps 6 --learning-rate 0.01" in text
    assert not re.search(r'(src|href)="(?!#)', text.replace("xlink:href", "href"))
    assert "@import" not in text and "<script" not in text.lower() and plots.INK not in text
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))


def test_the_csv_has_the_numbers(page: Path, real_run: tuple[Path, str, str]) -> None:
    rows = list(csv.DictReader(page.with_suffix(".csv").read_text("utf-8").splitlines()))
    assert tuple(rows[0]) == COLUMNS
    subject = find(str(real_run[0]))
    assert subject.learning_rate is None and subject.name == "it's"
    sizes = [float(r["value"]) for r in rows if r["quantity"] == "weight_rms" and r["feature"] == "momentum"]
    np.testing.assert_allclose(
        sizes, np.sqrt(np.mean(first_layer(subject.optimizer)["momentum"] ** 2, axis=1))
    )
    assert len([r for r in rows if r["quantity"] == "loss"]) == 18
    assert {r["quantity"] for r in rows} >= {
        *(f"response_{n}" for n in ("median", "percentile_10", "percentile_90", "zero")),
        *(
            "cosine_raw",
            "cosine_step",
            "change_without",
            "raw_change_without",
            "cosine_without",
            "loss_without",
        ),
    }
    assert all(np.isfinite(float(r["value"])) for r in rows)


def test_files_are_renewed_at_the_default_place_only(
    page: Path, real_run: tuple[Path, str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from celo_nnx.explain import page as pages

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pages, "html", lambda found, command: '<meta content="celo-nnx explain">' + command)
    monkeypatch.setattr(pages, "to_csv", lambda found: ",".join(COLUMNS))
    monkeypatch.setattr(pages, "record", lambda *a, **k: Recording(0.1, np.zeros((1, 2)), {}, {}))
    monkeypatch.setattr(pages, "responses", lambda *a: [])
    for _ in range(2):
        assert main(["explain", "celo2"]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["explain-celo2.csv", "explain-celo2.html"]
    (tmp_path / "explain-celo2.csv").write_text("mine")
    assert main(["explain", "celo2"]) == 2 and (tmp_path / "explain-celo2.csv").read_text() == "mine"
    assert main(["explain", "celo2", "--out", "b.html"]) == 0
    assert main(["explain", "celo2", "--out", "b.html"]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["celo3"], "unknown weights 'celo3' (did you mean 'celo'?); known: celo, celo2, celo2_base"),
        (["celoo=hand_made"], "unknown variant 'celoo' (did you mean 'celo'?)"),
        (["celo2=hand_mad"], "did you mean 'hand_made'?"),
        (["celo_adam=hand_made"], "its update rule 'adam' is not an MLP over features"),
        (["nn_adam=hand_made"], "its update rule 'adam' is not an MLP over features"),
        (["none.safetensors"], "no theta at none.safetensors"),
        (["celo2=celo"], "theta of another optimizer"),
        (["celo2", "--steps", "1"], "steps = 1 is out of range"),
        (["celo2", "--steps", "99999999999"], "steps = 99999999999 is out of range"),
        (["celo2", "--learning-rate", "-1"], "learning_rate = -1.0 is out of range"),
        (["celo2", "--out", "a.txt"], "out = 'a.txt' is out of range: must be a new file NAME.html"),
        (["celo2", "--out", "none/a.html"], "no folder none for a.html"),
    ],
)
def test_mistakes_are_told_in_one_line(
    arguments: list[str],
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["explain", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1 and not list(tmp_path.iterdir())


def test_banks_and_context_have_first_layer_weights_too() -> None:
    velo = load_optimizer("velo_s", weights="hand_made")
    assert [w.rms.shape for w in weights(velo) if w.group == "momentum"] == [(3,)]
    rnn = load_optimizer("rnn_mlp", weights="hand_made")
    made = {w.group: w for w in weights(rnn)}
    assert made["controls"].context and made["controls"].rms.shape == (17,) and not made["gradient"].context
    assert plane_labels(rnn, (("momentum", 5),))["momentum"][0] == "0.5"
