"""Grid files and suites: what their ``get_config`` may give works or is refused in one line."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import made_grid
import pytest
from fuzzing import Tally, altered, examples, texts
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import ConfigDict

from celo_nnx.config import run_file
from celo_nnx.evaluation.suites import load_suite
from celo_nnx.grids.grid_file import load_grid
from celo_nnx.grids.plan import plan

FILE = "import fuzzed\n\n\ndef get_config():\n    return fuzzed.config\n"


@pytest.fixture
def given_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A config file, and a function that sets what it gives."""
    module = types.ModuleType("fuzzed")
    monkeypatch.setitem(sys.modules, "fuzzed", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "mine.py").write_text(FILE)

    def put(config: Any) -> str:
        try:
            module.config = ConfigDict(config)
        except Exception:  # a tree that no ConfigDict holds
            module.config = config
        return str(tmp_path / "mine.py")

    return put


@pytest.fixture
def grid(tmp_path: Path) -> dict[str, Any]:
    settings = run_file(made_grid.file(tmp_path)).to_dict()
    settings["axes"] = [[name, {k: list(v) for k, v in labels.items()}] for name, labels in settings["axes"]]
    extra = [["more", ["optimizer.weight_decay=0.1"]]]
    return settings | {"overrides": list(settings["overrides"]), "cells": extra, "skip": [{"rate": "3e-3"}]}


@examples(20, 250)
@given(choices=st.data())
def test_grids(tally: Tally, given_config: Any, grid: dict[str, Any], choices: st.DataObject) -> None:
    file = given_config(choices.draw(altered(grid | {"seeds": [0]})))
    overrides = choices.draw(st.lists(st.one_of(texts, st.just("run.iterations=3")), max_size=1))
    with tally.trying():
        plan(load_grid(file, overrides))


@examples(20, 150)
@given(choices=st.data())
def test_suites(tally: Tally, given_config: Any, choices: st.DataObject) -> None:
    from celo_nnx.experiments.suites import smoke

    file = given_config(choices.draw(altered(smoke.get_config().to_dict())))
    key = choices.draw(
        st.sampled_from(("steps", "tasks.*.batch_size", "tasks.mlp.hidden", "tasks.*", "", "x"))
    )
    overrides = choices.draw(st.lists(texts.map(lambda text: f"{key}={text}"), max_size=1))
    with tally.trying(Path(os.environ["CELO_NNX_CACHE"])):
        load_suite(file, overrides)
