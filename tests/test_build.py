"""From config to optimizer: overrides, swaps, extension from another package, and every kind of mistake."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from celo_nnx import UserError
from celo_nnx.build import build, list_parts
from celo_nnx.config import load, load_optimizer, presets
from celo_nnx.description import describe


def theta_size(overrides: list[str]) -> int:
    return sum(x.size for x in jax.tree.leaves(build(load("celo2", overrides).optimizer).theta))


def test_published_size() -> None:
    assert theta_size([]) == 347


def test_swapping_a_part_without_meta_parameters_keeps_thetas_paths() -> None:
    a = build(load("celo2").optimizer).theta
    b = build(load("celo2", ["optimizer.orthogonalization.kind=identity"]).optimizer).theta
    assert jax.tree.structure(a) == jax.tree.structure(b)


def test_overrides_by_type() -> None:
    config = load(
        "celo2:fast_digits",
        [
            "optimizer.update_rule.hidden=4,4",
            "run.iterations=5",
            "optimizer.weight_decay=1",
            "run.progress=false",
        ]
        + ["optimizer.features.groups=gradient,momentum", "tasks.hidden=16"],
    )
    assert config.optimizer.update_rule.hidden == (4, 4) and config.run.iterations == 5
    assert config.optimizer.weight_decay == 1.0 and config.run.progress is False
    assert config.optimizer.features.groups == ("gradient", "momentum") and config.tasks.hidden == (16,)
    assert theta_size(
        ["optimizer.update_rule.hidden=4,4", "optimizer.features.groups=gradient,momentum"]
    ) == (4 * 4 + 4 + 4 * 4 + 4 + 4 * 3 + 3)


def test_kind_override_takes_the_new_parts_defaults_in_any_order() -> None:
    swap = "optimizer.schedule.kind=optax"
    name = "optimizer.schedule.name=cosine_decay_schedule"
    with pytest.raises(UserError, match="does not take"):
        build(load("celo2", [name, swap]).optimizer)
    config = load("celo2", ["meta.unroll.length=70", "meta.unroll.kind=constant"])
    assert config.meta.unroll.to_dict() == {"kind": "constant", "length": 70}


@pytest.mark.parametrize(
    "override,message",
    [
        ("optimizer.orthogonalization.kind=newton_shulz", "did you mean 'newton_schulz'"),
        ("optimizer.orthogonalisation.kind=identity", "did you mean 'orthogonalization'"),
        ("optimizer.orthogonalization.step=3", "did you mean 'steps'"),
        (
            "optimizer.orthogonalization.steps=0",
            "steps = 0 is out of range: must be an integer from 1 to 100",
        ),
        ("optimizer.orthogonalization.steps=two", "expected int"),
        ("optimizer.features.groups=gradient,momentums", "did you mean 'momentum'"),
        ("optimizer.features.options.clipped_gradient.limit=-1", "limit = -1.0 is out of range"),
        ("optimizer.accumulators.momentum.decays=0.9,1.5", r"decays = \(0.9, 1.5\) is out of range"),
        ("optimizer.accumulators.factored.decays=0.9", "as many decays as momentum"),
        ("optimizer.update_rule.activation=rleu", "did you mean 'relu'"),
        ("optimizer.weight_decay=-1", "weight_decay = -1.0 is out of range"),
        ("optimizer.schedule", "not of the form key=value"),
        ("optimizer.schedule=3", "is a section"),
        ("sede=3", "did you mean 'seed'"),
        ("seed=-1", "seed = -1 is out of range"),
        ("theta_init.kind=file", "theta_init.path = '' is out of range"),
        ("optimizer.tensors.matrix=1", "rows of \\(path, axis, axis\\)"),
        ("theta_init.kind=handmade", "did you mean 'hand_made'"),
        ("theta_init.noise=-0.5", "theta_init.noise = -0.5 is out of range"),
        ("meta.estimator.kind=pess", "did you mean 'pes'"),
    ],
)
def test_mistakes_in_a_config_are_told_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        config = load("celo2", [override])
        build(config.optimizer, theta_init=config.theta_init)
    assert "\n" not in str(error.value)


def test_mistakes_in_the_name() -> None:
    with pytest.raises(UserError, match="did you mean 'celo2'"):
        load("celo22")
    with pytest.raises(UserError, match="task preset"):
        load("fast_digits")
    with pytest.raises(UserError, match="no config file"):
        load("missing.py")


def test_a_config_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from celo_nnx.experiments import celo2\n"
        "def get_config(tasks='fast_digits'):\n"
        "    config = celo2.get_config(tasks)\n"
        "    config.optimizer.orthogonalization.steps = 7\n"
        "    return config\n"
    )
    assert load(str(path)).optimizer.orthogonalization.steps == 7
    path.write_text("def get_config():\n    return 1 / 0\n")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load(str(path))
    path.write_text(
        "from celo_nnx.experiments import celo2\n"
        "def get_config():\n"
        "    config = celo2.get_config('fast_digits')\n"
        "    config.run.iteration = 7\n"
        "    return config\n"
    )
    with pytest.raises(UserError, match="did you mean 'iterations'"):
        load(str(path))
    path.write_text("x = = 1\n")
    with pytest.raises(UserError, match="SyntaxError"):
        load(str(path))


def test_describe_names_parts_and_sizes() -> None:
    text = describe(build(load("celo2").optimizer))
    assert "newton_schulz" in text and "meta-parameters: 347" in text and "16.02 bytes a parameter" in text


def test_every_preset_loads() -> None:
    for name, (summary, whole) in presets().items():
        assert summary
        if whole:
            load_optimizer(name)


PART = '''
import jax.numpy as jnp
from celo_nnx.interfaces import Feature

class SignGradient(Feature):
    """The gradient's sign: one plane."""

    def __init__(self, *, scale: float = 1.0) -> None:
        self.scale = float(scale)

    def width(self, banks):
        return 1

    def planes(self, view):
        return [self.scale * jnp.sign(view.grad)]
'''


def test_a_part_from_another_installed_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, wheel = tmp_path / "site", tmp_path / "sign_part-0-py3-none-any.whl"
    info = {
        "METADATA": "Metadata-Version: 2.1\nName: sign-part\nVersion: 0\n",
        "WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": "[celo_nnx.components]\nfeatures.sign_gradient = sign_part:SignGradient\n",
        "RECORD": "",
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("sign_part.py", PART)
        for name, text in info.items():
            archive.writestr(f"sign_part-0.dist-info/{name}", text)
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip to install a package with")
    installer = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*installer, "--target", str(site), str(wheel)], check=True)
    monkeypatch.syspath_prepend(str(site))
    importlib.invalidate_caches()
    assert "sign_gradient" in list_parts()["features"]
    config = load("celo2_base", ["optimizer.features.groups=gradient,sign_gradient"])
    assert config.optimizer.features.options.sign_gradient.scale == 1.0
    opt = build(config.optimizer)
    opt = opt.with_theta({"update_rule": opt.update_rule.hand_made(mix=(("sign_gradient", 0, 1.0),))})
    params = {"w": jnp.ones((4, 20))}
    grads = {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 20)), jnp.float32)}
    updates, _ = opt.update(grads, opt.init(params), params, learning_rate=1.0)
    np.testing.assert_allclose(updates["w"], -jnp.sign(grads["w"]), atol=1e-5)
