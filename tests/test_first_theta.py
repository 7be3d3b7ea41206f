"""Where theta starts: from a theta file, a run folder or published weights, whole or in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from published_trees import joined, tree
from safetensors.numpy import save

from celo_nnx.build import build
from celo_nnx.cli import main
from celo_nnx.config import load
from celo_nnx.errors import UserError
from celo_nnx.meta.checkpoint import flatten
from celo_nnx.pretrained import layouts, messagepack
from celo_nnx.pretrained.convert import first_theta
from celo_nnx.theta_io import save_theta


def started(path: Path, *changes: str, variant: str = "celo") -> dict[str, np.ndarray]:
    """Theta by path, as a run starts with it."""
    config = load(variant, ["theta_init.kind=file", f"theta_init.path={path}", *changes])
    start = first_theta(config.theta_init, config.optimizer)
    return to_flat(build(config.optimizer, jax.random.key(5), start).theta)


def to_flat(theta: Any) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf) for name, leaf in flatten(theta).items()}


def random(variant: str = "celo") -> dict[str, np.ndarray]:
    return to_flat(build(load(variant).optimizer, jax.random.key(5)).theta)


@pytest.fixture(scope="module")
def published() -> dict[str, np.ndarray]:
    return layouts.flatten(layouts.to_own("celo", tree("celo")))


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same theta in every form that a start may have."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "theta.state").write_bytes(messagepack.dumps(tree("celo")))
    (folder / "joined.safetensors").write_bytes(save(joined(tree("celo"))))
    (folder / "run").mkdir()
    own = layouts.to_own("celo", tree("celo"))
    for path in (folder / "own.safetensors", folder / "run" / "theta.safetensors"):
        save_theta(path, own)
    return {name: folder / name for name in ("theta.state", "joined.safetensors", "own.safetensors", "run")}


KINDS = ("theta.state", "joined.safetensors", "own.safetensors", "run")


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_it(sources: dict[str, Path], published: dict[str, np.ndarray], kind: str) -> None:
    theta = started(sources[kind])
    assert theta.keys() == published.keys()
    for name, leaf in theta.items():
        assert leaf.tobytes() == published[name].tobytes(), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_of_it(sources: dict[str, Path], published: dict[str, np.ndarray], kind: str) -> None:
    theta, drawn = started(sources[kind], "theta_init.only=^update_rule/"), random()
    for name, leaf in theta.items():
        expected = published if name.startswith("update_rule/") else drawn
        assert leaf.tobytes() == expected[name].tobytes(), name
    assert any(not np.array_equal(drawn[name], published[name]) for name in published)


def test_a_part_from_another_optimizer(sources: dict[str, Path], published: dict[str, np.ndarray]) -> None:
    """Celo's schedule for an update rule of another size, with noise on all of it."""
    wider = ("optimizer.update_rule.hidden=(8,8)", "theta_init.only=schedule/")
    theta = started(sources["run"], *wider)
    assert all(np.array_equal(theta[k], v) for k, v in published.items() if k.startswith("schedule/"))
    noisy = started(sources["run"], *wider, "theta_init.noise=0.5")
    assert all((noisy[k] != theta[k]).any() for k in theta)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("theta_init.only=update_rules/",), "theta_init.only: 'update_rules/' is found in no path of theta"),
        (("theta_init.only=(",), "theta_init.only: '.' is not a regular expression"),
        (("optimizer.update_rule.hidden=(8,8)",), r"'update_rule/.* is float32\["),
        (
            ("theta_init.only=update_rule/", "optimizer.update_rule.hidden=(8,8)"),
            r"'update_rule/.* is float32\[",
        ),
    ],
)
def test_mistakes(sources: dict[str, Path], kind: str, changes: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        started(sources[kind], *changes)
    assert "\n" not in str(caught.value)


def test_leaves_that_the_file_lacks(sources: dict[str, Path], tmp_path: Path) -> None:
    own = layouts.to_own("celo", tree("celo"))
    save_theta(tmp_path / "part.safetensors", {"update_rule": own["update_rule"]})
    with pytest.raises(UserError, match="part.safetensors lacks 'schedule/.* missing"):
        started(tmp_path / "part.safetensors")
    with pytest.raises(UserError, match="part.safetensors lacks 'schedule/.* missing"):
        started(tmp_path / "part.safetensors", "theta_init.only=schedule/")
    assert started(tmp_path / "part.safetensors", "theta_init.only=update_rule/")


@pytest.mark.parametrize("kind", ["theta.state", "own.safetensors", "joined.safetensors"])
def test_broken_files(sources: dict[str, Path], tmp_path: Path, kind: str, capsys: Any) -> None:
    broken = tmp_path / kind
    broken.write_bytes(sources[kind].read_bytes()[:-9])
    pickled = tmp_path / "theta.pt"
    pickled.write_bytes(b"PK\x03\x04" + bytes(64))
    for path, message in (
        (broken, str(broken)),
        (pickled, "is a pickle"),
        (tmp_path / "none.state", "no theta at"),
        (tmp_path, "no theta at"),
    ):
        command = ["describe", "celo", "theta_init.kind=file", f"theta_init.path={path}"]
        assert main(command) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line


def test_only_a_file_can_be_taken_in_part() -> None:
    config = load("celo", ["theta_init.only=update_rule/"])
    with pytest.raises(UserError, match="theta_init.only = .* unless theta_init.kind is 'file'"):
        build(config.optimizer, theta_init=first_theta(config.theta_init, config.optimizer))
