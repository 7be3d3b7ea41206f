"""What describe says: sizes, meta-parameters without effect, the picture's geometry, routing."""

from __future__ import annotations

import io
import re
import struct
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from celo_nnx import dead, description, diagram, model_file
from celo_nnx.build import GROUPS, SLOTS, build
from celo_nnx.cli import main
from celo_nnx.config import load, presets
from celo_nnx.dead import Dead, find_dead
from celo_nnx.description import describe
from celo_nnx.errors import UserError
from celo_nnx.interfaces import MetaParam, UpdateRule
from celo_nnx.optimizer import LearnedOptimizer

VARIANTS = sorted(name for name, (_, whole) in presets().items() if whole and name != "velo")  # as velo_s
EVERY_SLOT = {*SLOTS, *GROUPS, "features"}
FEW = "optimizer.features.groups=gradient,momentum"  # compiles quickly, and no plane's weights are dead
SVG = "{http://www.w3.org/2000/svg}"


def made(name: str, *overrides: str) -> LearnedOptimizer:
    return build(load(name, overrides).optimizer)


# --- the table --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_described_and_drawn(name: str) -> None:
    optimizer = made(name)
    text, parts = describe(optimizer), description.rows(optimizer)
    assert max(len(line) for line in text.splitlines()) <= 100
    assert {line.split()[0] for line in text.splitlines() if line} >= EVERY_SLOT
    total = sum(x.size for x in jax.tree.leaves(optimizer.theta))
    assert sum(row.theta for row in parts) == total
    assert f"meta-parameters: {total:,}" in text
    for row in parts:
        assert row.kind in text and row.name in text
    planes = {row.name: row.width for row in parts if row.slot in ("features", "context")}
    for group, x in optimizer.theta.get("update_rule", {}).get("w0", {}).items():
        assert planes[group] == x.shape[-2]
    picture = diagram.draw(optimizer, name)
    words = {t for e in ElementTree.fromstring(picture).iter(f"{SVG}text") for t in e.itertext()}
    assert {*EVERY_SLOT, name} <= words
    assert {row.kind for row in parts if row.slot != "features"} <= words
    check_geometry(picture)


def test_rows_are_as_wide_as_the_schedule_reads() -> None:
    for name in ("celo", "nn_adam", "rnn_mlp", "velo_s"):
        optimizer = made(name)
        width = sum(row.width or 0 for row in description.rows(optimizer) if row.slot == "rows")
        theta = optimizer.theta["schedule"]
        hidden = theta["initial"]["cell"].shape[1]
        assert width == (
            theta["mix"]["skip"]["w"].shape[0] if "mix" in theta else theta["lstm"]["w"].shape[0] - hidden
        )


def test_state_bytes_are_those_of_the_state() -> None:
    factored = 3 * 2 * 1024 * 4 / 1024**2  # always float32
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        optimizer = made("celo2", f"optimizer.state.dtype={dtype}")
        state = {f"{r.slot}.{r.name}": r.state for r in description.rows(optimizer) if r.state is not None}
        want = {"momentum": 3 * size, "second_moment": size, "factored": factored}
        assert state == {f"accumulators.{n}": x for n, x in want.items()} | {"routes.adam": 2 * size}
        assert f"{4 * size + factored:.2f} bytes a parameter ({dtype})" in describe(optimizer)
        kept = jax.eval_shape(optimizer.init, {"kernel": jnp.zeros((1024, 1024))})["learned"]
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(kept)) / 1024**2
        assert total == pytest.approx(4 * size + factored)


def test_settings_that_differ_are_marked() -> None:
    plain = describe(made("celo2"))
    assert "steps=5" in plain and "eps=1e-09" in plain
    assert plain.count("*") == 1  # the header's, which says what it means
    changed = ["steps=7", "coefficients=((3.0,-3.2,1.2),(1.5,-0.5,0.0))"]
    text = describe(made("celo2", *(f"optimizer.orthogonalization.{c}" for c in changed)))
    assert "steps=7*" in text and "coefficients=((3, -3.2, 1.2), (1.5, -0.5, 0))*" in text
    text = describe(made("celo2_base", "optimizer.tensors.matrix=(('kernel',0,(1,2)),)", "optimizer.tile=9"))
    assert "matrix=((kernel, 0, (1, 2)),)*" in text and re.search(r"^tile +9\*$", text, re.MULTILINE)


def test_terminal_gets_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = made("celo", "optimizer.schedule.rate_factor=0.2")
    monkeypatch.setenv("COLUMNS", "100")
    description.show(optimizer)
    words, plain = capsys.readouterr().out.split(), describe(optimizer).replace("*", "").split()
    assert set(plain) - set(words) <= {"(", "not"}  # of the header, which says how they are marked


# --- meta-parameters without effect -----------------------------------------------------------------------

EIGHTEEN = [Dead("update_rule/b2[1:]", 2, False), Dead("update_rule/w2[:, 1:]", 16, False)]


def test_celo2_has_eighteen_dead() -> None:
    assert find_dead(made("celo2", FEW)) == EIGHTEEN
    # with a magnitude, the log-magnitude's column lives; ways of storing and cutting tensors change nothing
    others = ("optimizer.state.dtype=bfloat16", "optimizer.tile=2", "optimizer.tensors.matrix=(('x',0,1),)")
    assert find_dead(made("celo2_base", FEW, "optimizer.step.exp_mult=0.001", *others)) == [
        Dead("update_rule/b2[2]", 1, False),
        Dead("update_rule/w2[:, 2]", 8, False),
    ]


def test_celo_has_a_dead_layer_and_controls_of_one() -> None:
    want = [
        Dead("schedule/controls", 65, True),
        Dead("schedule/mix/dead", 1216, False),
        Dead("update_rule/b2[0, 2]", 1, False),
        Dead("update_rule/w2[0, :, 2]", 4, False),
    ]
    assert find_dead(made("celo", FEW)) == want
    text = dead.report(want, 37089)
    assert text.splitlines()[0] == "meta-parameters without effect: 1,286 of 37,089"
    assert re.search(r"schedule/controls +65  read, but", text)
    # in the first phase the schedule decides nothing, so all of it is dead
    assert find_dead(made("celo_phase1", FEW)) == [Dead("schedule", 36930, True), *want[2:]]


@pytest.mark.drill
@pytest.mark.parametrize("name", ["celo2", "celo2_base", "celo2_published"])
def test_no_plane_of_celo2_is_dead(name: str) -> None:
    assert find_dead(made(name)) == EIGHTEEN


@pytest.mark.drill
def test_velo_has_a_dead_layer_and_an_unused_output() -> None:
    assert find_dead(made("velo_s")) == [
        Dead("schedule/mix/dead", 1984, False),
        Dead("update_rule/b2[:, 2]", 32, False),
        Dead("update_rule/w2[:, :, 2]", 128, False),
    ]


class Tricky(UpdateRule):
    """Entries whose derivative or whose tensors mislead: only some of them are dead."""

    def __init__(self) -> None:
        self.lower = MetaParam(jnp.ones((3, 3)))  # above the diagonal nothing is read
        self.never = MetaParam(jnp.ones(2))
        self.off = MetaParam(jnp.full((2,), -1.5))  # relu is off at the start
        self.only_rank4 = MetaParam(jnp.ones(()))
        self.one = MetaParam(jnp.ones((1,)))  # a softmax of one
        self.rounded = MetaParam(jnp.ones(()))  # no derivative, but an effect
        self.small = MetaParam(jnp.ones(()))  # too small to be seen beside 1

    def prepare(self, *_):
        return {}

    def __call__(self, groups, prepared, shape):
        total = jnp.sum(jnp.tril(self.lower[...]) * jnp.arange(1.0, 10.0).reshape(3, 3))
        total += jnp.sum(jax.nn.relu(self.off[...])) + jnp.round(self.rounded[...]) + 1e-9 * self.small[...]
        total += jax.nn.softmax(self.one[...])[0]
        if len(shape) == 4:
            total += self.only_rank4[...]
        return groups["gradient"][0] * total, None, []


def test_effects_that_are_hard_to_see_are_seen() -> None:
    optimizer = made("celo2_base", FEW, "optimizer.output_normalization.kind=identity")
    optimizer.update_rule = Tricky()
    assert find_dead(optimizer) == [
        Dead("update_rule/lower[0, 1] and others", 3, False),
        Dead("update_rule/never", 2, False),
        Dead("update_rule/one", 1, True),
    ]


def test_nothing_learned_is_told() -> None:
    assert find_dead(made("celo2_base", "optimizer.update_rule.kind=adam")) == []
    all_to_adam = made("celo2", "optimizer.routing.kind=regex", "optimizer.routing.pattern=kernel")
    with pytest.raises(UserError, match="no tensor to the learned rule"):
        find_dead(all_to_adam)


# --- the picture ------------------------------------------------------------------------------------------


def check_geometry(picture: str) -> None:
    """Texts, at the width of a wide monospaced font, overlap neither each other nor their box's edges."""
    root = ElementTree.fromstring(picture)
    width, height = (float(root.get(k)) for k in ("width", "height"))
    rects = [[float(r.get(k)) for k in ("x", "y", "width", "height")] for r in root.iter(f"{SVG}rect")][1:]
    spans = []
    for element in root.iter(f"{SVG}text"):
        size = 17 if element[:1] and element[0].get("class") == "title" else 12
        length = len("".join(element.itertext())) * size * 0.605
        x, y = float(element.get("x")), float(element.get("y"))
        x -= length if element.get("text-anchor") == "end" else 0
        spans.append((y, x, x + length))
        assert 0 <= x and x + length <= width and size <= y <= height
        for left, top, w, h in rects:
            if top < y < top + h and left <= x <= left + w:
                assert left + 8 <= x and x + length <= left + w - 8 and top + 9 < y < top + h - 3
    for i, (y0, left0, right0) in enumerate(spans):
        for y1, left1, right1 in spans[i + 1 :]:
            assert abs(y0 - y1) >= 13 or right0 + 3 < left1 or right1 + 3 < left0
    for i, (x0, y0, w0, h0) in enumerate(rects):
        for x1, y1, w1, h1 in rects[i + 1 :]:
            assert x0 + w0 <= x1 or x1 + w1 <= x0 or y0 + h0 <= y1 or y1 + h1 <= y0


def test_picture_holds_whatever_a_config_says() -> None:
    overrides = [f"optimizer.routing.pattern={'<&>' + 'layer|' * 60}"]
    overrides.append("optimizer.accumulators.momentum.learned=True")
    many = ", ".join(f"({i}.5, -{i}.25, 0.125)" for i in range(1, 40))
    overrides.append(f"optimizer.orthogonalization.coefficients=({many})")
    optimizer = made("celo2_published", *overrides)
    picture = diagram.draw(optimizer, "a title with \x1b[31m <tags> & " + "more " * 40, ["a note " * 60])
    check_geometry(picture)
    words = " ".join("".join(e.itertext()) for e in ElementTree.fromstring(picture).iter(f"{SVG}text"))
    assert "<&>layer" in words and "3, 3 meta-parameters, 12.00 bytes" in words and "\x1b" not in words
    assert all(f"{i}.25" in words for i in range(1, 40))


def test_wires_follow_what_the_schedule_decides() -> None:
    def wires(name: str) -> int:
        return diagram.draw(made(name)).count('class="tip"')

    plain = wires("celo2_base")
    assert plain == len(diagram.LEFT) + 2  # down the left column, and the learning rate
    assert wires("celo2") == plain + 2  # routing to routes to the update
    assert wires("celo") == plain + 4  # loss to tracker to rows to schedule, which mixes
    assert wires("celo_adam") == plain + 3
    assert wires("velo_s") == plain + 5  # rows look at accumulators
    assert wires("adafac_mlp") == plain + 1  # context
    assert ">rate, decays, eps<" in diagram.draw(made("nn_adam"))


# --- the command ------------------------------------------------------------------------------------------


def test_command_draws_into_a_new_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "celo2.svg"
    argv = ["describe", "celo2_adam_features", "--svg", str(file), "optimizer.schedule.value=0.25", FEW]
    assert main([*argv, "--dead"]) == 0
    out, picture = capsys.readouterr().out, file.read_text()
    assert "value=0.25*" in out and "meta-parameters without effect: 18 of" in out
    assert "update_rule/w2[:, 1:]" in out and "update_rule/w2[:, 1:]" in picture
    assert ElementTree.fromstring(picture).tag == f"{SVG}svg" and "celo2_adam_features" in picture
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "exists; name a new file" in captured.err
    assert file.read_text() == picture and [p.name for p in tmp_path.iterdir()] == ["celo2.svg"]
    assert main(["describe", "celo2", "--svg", str(tmp_path / "none" / "a.svg")]) == 2
    assert "no folder" in capsys.readouterr().err


def test_command_uses_columns_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", terminal := Terminal())
    assert main(["describe", "celo2"]) == 0
    assert "\x1b[" in terminal.getvalue() and "newton_schulz" in terminal.getvalue()


# --- a model's file ---------------------------------------------------------------------------------------

MODEL = {
    "embed": {"embedding": (50, 16)},
    "block": {"attention": {"query": {"kernel": (16, 4, 4), "bias": (4, 4)}}, "scale": (16,)},
    "conv": {"kernel": (3, 3, 8, 16)},
}


@pytest.mark.parametrize("separator", ["/", "."])
def test_routing_table_of_a_file(separator: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree = jax.tree.map(lambda s: np.zeros(s, np.float32), MODEL, is_leaf=lambda x: isinstance(x, tuple))
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    flat = {jax.tree_util.keystr(p, simple=True, separator=separator): x for p, x in paths}
    save_file(flat | {"step": np.zeros((), np.int32)}, tmp_path / "model.safetensors")
    assert main(["describe", "celo2", "--params", str(tmp_path / "model.safetensors")]) == 0
    out = capsys.readouterr().out
    assert made("celo2").routing_table(tree) in out
    assert out.endswith("left out, not floating-point: step\n")
    assert re.search(r"conv/kernel +\(3, 3, 8, 16\) +learned +rows 0,1,2 x columns 3", out)


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """bfloat16, which numpy lacks, and a file of 8 GB that is all but a hole."""
    header = b'{"a.w":{"dtype":"BF16","shape":[65536,65536],"data_offsets":[0,8589934592]}}'
    path = tmp_path / "huge.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + 8589934592)
    assert model_file.read_shapes(path) == ({"a/w": (65536, 65536)}, [])


def test_bad_model_files_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "model.safetensors"

    def fails() -> str:
        assert main(["describe", "celo2", "--params", str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        return captured.err

    assert "no file" in fails()
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    assert "not a readable safetensors file" in fails()
    save_file({"w": np.zeros((4, 4), np.float32)}, path)
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a readable safetensors file" in fails()
    save_file({"w": np.zeros(4, np.int64)}, path)
    assert "no floating-point tensor" in fails()
    save_file({"a.b": np.zeros(4), "a..b": np.zeros(4)}, path)
    assert "second tensor at 'a/b'" in fails()
    save_file({"a\x1b[31m": np.zeros(4)}, path)
    assert "cannot be printed" in (told := fails()) and "\x1b" not in told


def test_the_module_is_not_named_like_the_function() -> None:
    import celo_nnx

    assert celo_nnx.describe is describe
