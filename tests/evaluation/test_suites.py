"""Suites: loading, overrides, mistakes, and that every task can be built from its data."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import jax
import pytest

from celo_nnx import listing
from celo_nnx.config import presets
from celo_nnx.errors import UserError
from celo_nnx.evaluation.suites import Suite, load_suite, suites, task_family
from celo_nnx.experiments import fast_conv, fast_digits, fast_local, fast_text
from celo_nnx.interfaces import Family
from celo_nnx.tasks import hub, load_text

TINY = """'''Mine.'''
from ml_collections import ConfigDict
def get_config():
    task = dict(kind="image_mlp", datasets=("digits",), image_size=4)
    runs = dict(steps=10, schedule="constant", seeds=2, evaluations=2, batches=1, tasks=dict(a=task){more})
    return ConfigDict(runs)
"""


def write(folder: Path, more: str = "", text: str = TINY) -> str:
    path = folder / "mine.py"
    path.write_text(text.replace("{more}", more))
    return str(path)


def fits(family: Family) -> bool:
    """Whether the shapes of task and data agree, so that the loss of a batch is a number."""
    task = family.task

    def loss(data: dict[str, jax.Array]) -> jax.Array:
        keys = jax.random.split(jax.random.key(0), 3)
        sample = task.sample(keys[0])
        params, state = task.init(keys[1], sample)
        return task.loss(params, state, keys[2], task.draw(data, keys[2], 0, 10), sample)[0]

    return jax.eval_shape(loss, family.train).shape == ()


@pytest.mark.parametrize("name", ["celo17", "celo17_local", "selection", "smoke"])
def test_every_suite_loads_and_is_data(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name and suites()[name]
    again = Suite(**dataclasses.asdict(suite))
    assert again == suite
    json.dumps(dataclasses.asdict(suite))
    for section in suite.tasks.values():
        inner = section.get("inner", section)
        assert inner["validation"] > 0 and len(inner["datasets"]) == 1


def test_suites_are_listed_and_are_no_presets() -> None:
    assert set(suites()) == {"celo17", "celo17_local", "selection", "smoke"}
    assert not set(suites()) & set(presets()) and "suites" not in presets()
    shown = listing.lines("suites").splitlines()
    assert shown[0] == "suites" and [line.split()[0] for line in shown[1:]] == sorted(suites())


def test_the_local_seventeen_are_those_of_the_papers() -> None:
    paper, local = load_suite("celo17"), load_suite("celo17_local")
    counts: dict[str, int] = {}
    for name, section in paper.tasks.items():
        counts[section["kind"]] = counts.get(section["kind"], 0) + 1
        other = local.tasks[name]
        for field in ("kind", "activation", "normalization", "cell", "objective"):
            assert section.get(field) == other.get(field), (name, field)
        for field in ("hidden", "channels"):
            assert len(section.get(field, ())) == len(other.get(field, ())), (name, field)
    assert set(paper.tasks) == set(local.tasks) and len(paper.tasks) == 17
    assert counts == dict(
        image_mlp=4,
        conv_net=3,
        vision_transformer=1,
        image_autoencoder=2,
        transformer_lm=3,
        recurrent_lm=2,
        learned_optimizer=2,
    )
    assert paper.steps == 2000
    assert {s["batch_size"] for s in paper.tasks.values() if "batch_size" in s} == {128}


def test_the_papers_sets_and_widths() -> None:
    tasks = load_suite("celo17").tasks
    assert {
        name: (s["datasets"][0], s.get("hidden") or s.get("channels"))
        for name, s in tasks.items()
        if s["kind"] in ("image_mlp", "conv_net", "image_autoencoder", "vision_transformer")
    } == {
        "mlp_relu": ("cifar10", (128, 128, 128)),
        "mlp_second_set": ("cifar100", (128, 128, 128)),
        "mlp_tanh_norm": ("cifar10", (128, 128, 128)),
        "mlp_two_layers": ("fashion_mnist", (128, 128)),
        "conv": ("cifar10", (32, 64, 64)),
        "conv_batch_norm": ("cifar10", (32, 64, 64)),
        "conv_second_set": ("cifar100", (32, 64, 64)),
        "vit": ("cifar100", None),
        "autoencoder_cifar10": ("cifar10", (128, 32, 128)),
        "autoencoder_mnist": ("mnist", (128, 32, 128)),
    }
    texts = [s["datasets"][0] for s in tasks.values() if s["kind"].endswith("_lm")]
    assert sorted(texts) == ["lm1b"] * 4 + ["wikipedia"]
    assert tasks["mlp_tanh_norm"]["activation"] == "tanh"
    assert tasks["mlp_tanh_norm"]["normalization"] == "layer"
    assert tasks["conv_batch_norm"]["normalization"] == "batch"


def test_no_local_task_is_one_of_meta_training() -> None:
    for section in load_suite("celo17_local").tasks.values():
        one = section["kind"], section.get("hidden"), section.get("image_size"), section.get("grey")
        assert one != ("image_mlp", (32,), 8, True)


@pytest.mark.parametrize("name", ["selection", "smoke"])
def test_data_are_embedded(name: str) -> None:
    suite = load_suite(name, ["tasks.*.batch_size=3"])
    for name in suite.tasks:
        family = task_family(suite, name)
        assert (
            family.name == name
            and family.task.batch_size == 3
            and len(next(iter(family.validation.values())))
        )
        assert fits(family)


def test_selection_shares_no_task_with_meta_training_and_the_suites_of_results() -> None:
    def tasks(sections):
        return {(section["kind"], section.get("datasets")) for section in sections}

    presets = [fast_conv, fast_digits, fast_local, fast_text]
    trained = tasks(
        {**preset.get_config().to_dict(), "datasets": (name,)}
        for preset in presets
        for name in preset.get_config().datasets
    )
    suites = [load_suite(name).tasks.values() for name in ("celo17", "celo17_local")]
    chosen = tasks(load_suite("selection").tasks.values())
    assert len(chosen) == 3 and not chosen & (trained | tasks(suites[0]) | tasks(suites[1]))


def test_local_tasks_build(shared: Path) -> None:
    suite = load_suite("celo17_local")
    for name in suite.tasks:
        family = task_family(suite, name, str(shared / "data"))
        assert family.name == name and len(next(iter(family.validation.values()))) and fits(family)


def test_overrides_of_one_and_of_all() -> None:
    changes = ["steps=40", "evaluations=5", "seeds=7", "schedule=cosine"]
    suite = load_suite("smoke", [*changes, "tasks.*.width=20", "tasks.mlp.hidden=4,4,4", "tasks.*.grey=true"])
    assert (suite.steps, suite.evaluations, suite.seeds, suite.schedule) == (40, 5, 7, "cosine")
    plain = load_suite("smoke")
    expected = {name: dict(section) for name, section in plain.tasks.items()}
    expected["text"]["width"] = 20
    expected["mlp"]["hidden"] = (4, 4, 4)
    assert suite.tasks == expected and plain.tasks["text"]["width"] != 20
    # The last of several wins, and a section within a section is reached too.
    assert (
        load_suite("smoke", ["tasks.*.batch_size=8", "tasks.mlp.batch_size=9"]).tasks["mlp"]["batch_size"]
        == 9
    )
    inner = load_suite("celo17", ["tasks.*.inner.batch_size=16"]).tasks
    assert inner["learned_optimizer_mnist"]["inner"]["batch_size"] == 16
    assert inner["mlp_relu"]["batch_size"] == 128
    assert dataclasses.replace(suite, seeds=2).seeds == 2


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path), ["tasks.a.hidden=5"])
    assert suite.name == "mine" and suite.tasks["a"]["hidden"] == (5,)
    assert task_family(suite, "a").task.features == 16


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stepz=3"], "unknown config key 'stepz' .did you mean 'steps'"),
        (["name=x"], "unknown config key 'name'"),
        (["steps"], "not of the form key=value"),
        (["steps=0"], "steps = 0 .* from 1 to"),
        (["steps=x"], "steps = 'x': expected int"),
        (["evaluations=3"], "evaluations = 3 .*a divisor of steps = 200"),
        (["batches=0"], "batches = 0"),
        (["seeds=0"], "seeds = 0"),
        (["schedule=cosin"], "unknown schedule 'cosin' .did you mean 'cosine'"),
        (["tasks.mpl.batch_size=3"], "unknown config key of tasks, 'mpl' .did you mean 'mlp'"),
        (
            ["tasks.mlp.batchsize=3"],
            "unknown config key of tasks.mlp, 'batchsize' .did you mean 'batch_size'",
        ),
        (["tasks.*.batchsize=3"], "unknown setting of all tasks, 'batchsize' .did you mean 'batch_size'"),
        (["tasks.*.inner.batch_size=3"], "unknown setting of all tasks, 'inner.batch_size'"),
        (["tasks.mlp=3"], "tasks.mlp is a section"),
        (["tasks.mlp.batch_size=0"], "tasks.mlp: batch_size = 0"),
        (["tasks.mlp.image_size=0"], "tasks.mlp: image_size = 0"),
        (["tasks.text.level=char"], "tasks.text: unknown level 'char' .did you mean 'character'"),
        (["tasks.text.cell=grub"], "tasks.text: unknown cell 'grub' .did you mean 'gru'"),
        (["tasks.mlp.datasets=digits,mnist"], "tasks.mlp: tasks.datasets = .*exactly one name"),
        (["tasks.mlp.validation=1.5"], "tasks.mlp: tasks.validation = 1.5"),
    ],
)
def test_wrong_overrides(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_suite("smoke", overrides)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("smok", "unknown suite 'smok' .did you mean 'smoke'"),
        (
            "celo2",
            "celo2 is an optimizer variant, not a suite; known: celo17, celo17_local, sel",
        ),
        ("fast_digits", "fast_digits is a task preset, not a suite"),
        ("absent.py", "no config file absent.py"),
    ],
)
def test_wrong_sources(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        load_suite(source)


HEAD = "from ml_collections import ConfigDict\n"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            TINY.replace("{more}", ", step=3"),
            "unknown setting of the suite mine, 'step' .did you mean 'steps'",
        ),
        (TINY.replace("{more}", "").replace("batches=1, ", ""), "the suite mine has no setting 'batches'"),
        (TINY.replace("{more}", "").replace("dict(a=task)", "{}"), "tasks = {} .*one or more"),
        (TINY.replace("{more}", "").replace("dict(a=task)", "{'a/b': task}"), "name of a task = 'a/b'"),
        (TINY.replace("{more}", "").replace("dict(a=task)", "dict(a=3)"), "tasks.a = 3 must be a section"),
        (
            TINY.replace("{more}", "").replace("image_size=4", "image_size=4, vary=dict(batch_size=(1, 2))"),
            "tasks.a: tasks.vary yields several",
        ),
        (
            TINY.replace("{more}", "").replace("a=task", "a=dict(kind='mixture', parts=dict(b=task))"),
            "tasks.a: tasks.parts yields several",
        ),
        (
            TINY.replace("{more}", "")
            .replace("a=task", "a=dict(kind='learned_optimizer', inner=task)")
            .replace('("digits",)', '("digits", "mnist")'),
            "tasks.a: tasks.inner: tasks.datasets = .*exactly one",
        ),
        (TINY.replace("{more}", "").replace("image_mlp", "image_mpl"), "unknown task kind 'image_mpl'"),
        (HEAD + "def get_config():\n    return ConfigDict(dict(kind='image_mlp'))", "mine is a task preset"),
        (
            HEAD + "def get_config():\n    return ConfigDict(dict(optimizer={}))",
            "mine is an optimizer variant",
        ),
        ("x = 1", "has no function get_config"),
        ("1 / 0", "failed: ZeroDivisionError"),
    ],
)
def test_wrong_files(text: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as error:
        load_suite(write(tmp_path, text=text))
    assert "\n" not in str(error.value)


def test_absent_data_and_tasks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    suite = load_suite("celo17")
    with pytest.raises(UserError, match="unknown task of the suite celo17, 'vti' .did you mean 'vit'"):
        task_family(suite, "vti")
    for name, words in {
        "vit": "tasks.vit: data set 'cifar100' not found.*looked for cifar100.npz.*celo-nnx.hub",
        "rnn_second_text": "text 'wikipedia' not found.*wikimedia/wikipedia.*wikipedia.txt",
    }.items():
        with pytest.raises(UserError, match=words) as error:
            task_family(suite, name)
        assert "\n" not in str(error.value)


def fake_hub(monkeypatch: pytest.MonkeyPatch, rows: list[str], error: Exception | None = None) -> list:
    """Puts a stand-in in the place of ``datasets``; returns the list of what is asked of it."""
    asked: list = []

    def load_dataset(*place: object, split: str, streaming: bool) -> object:
        asked.append((*place, split, streaming))

        def stream() -> object:
            for text in rows:
                asked.append(text)
                yield {"text": text}
            if error is not None:
                raise error

        return stream()

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_texts_of_the_hub_are_streamed_no_further_than_needed_and_cached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CELO_NNX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "TEXT_BYTES", 9)
    asked = fake_hub(monkeypatch, ["abc", "dé", "föö", "never"])
    first = load_text("lm1b", level="byte")
    # 4 + 4 bytes, and of the third row 'f': the next character has two bytes, of which none would fit.
    assert first.tokens.tobytes() == "abc\ndé\nf".encode() and "dvruette/lm1b" in first.source
    assert asked == [("dvruette/lm1b", None, "train", True), "abc", "dé", "föö"]
    assert load_text("lm1b", level="byte").tokens.tobytes() == first.tokens.tobytes() and len(asked) == 4
    monkeypatch.setattr(hub, "TEXT_BYTES", 10)  # one byte of two: the character is left out
    assert load_text("lm1b", level="byte").tokens.tobytes() == "abc\ndé\nf".encode() and len(asked) == 8
    load_text("wikipedia", level="character")
    assert asked[8] == ("wikimedia/wikipedia", "20231101.en", "train", True)
    (tmp_path / "lm1b.txt").write_text("mine")
    assert load_text("lm1b", level="byte", data_dir=str(tmp_path)).tokens.tobytes() == b"mine"


def test_a_hub_that_breaks_off_is_one_line_and_leaves_no_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CELO_NNX_CACHE", str(tmp_path / "cache"))
    for error in (ConnectionError("no\nroute"), RuntimeError("no\nroute")):
        fake_hub(monkeypatch, ["abc"], error)
        with pytest.raises(
            UserError, match="text 'lm1b' could not be read from .*no route; or put lm1b.txt"
        ) as told:
            load_text("lm1b", level="byte")
        assert "\n" not in str(told.value) and not (tmp_path / "cache").exists()


def test_the_papers_language_models_build_from_the_hub(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CELO_NNX_CACHE", str(tmp_path))
    fake_hub(monkeypatch, ["The quick brown fox jumps over the lazy dog."] * 100)
    suite = load_suite("celo17", ["tasks.*.width=8", "tasks.*.batch_size=2"])
    for name, section in suite.tasks.items():
        if section["kind"].endswith("_lm"):
            assert fits(task_family(suite, name)) and section["level"] == "byte"
