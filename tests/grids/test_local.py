"""The local engine, with cells that need no JAX: pool, retries, stop, processes of a driver that died."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from celo_nnx.devices import cores
from celo_nnx.errors import UserError
from celo_nnx.grids.local import Local, slots, visible_gpus
from celo_nnx.grids.store import CellFolder

STUB = Path(__file__).resolve().parents[1] / "stub_cell.py"


def command(path: Path) -> list[str]:
    return [sys.executable, str(STUB), str(path)]


def make(tmp_path: Path, *scripts: str) -> list[CellFolder]:
    folders = []
    for i, script in enumerate(scripts):
        path = tmp_path / f"cell{i}"
        path.mkdir()
        (path / "script").write_text(script)
        folders.append(CellFolder(path))
    return folders


class Told:
    """Collects what the engine tells."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def __call__(self, event: str, folder: CellFolder) -> None:
        self.events.append((event, folder.path.name))

    def of(self, name: str) -> list[str]:
        return [event for event, one in self.events if one == name]


def half_of_the_cores() -> int:
    """What each of two cells is bound to; macOS binds no process, and the stand-in tells 0."""
    return max(1, cores() // 2) if hasattr(os, "sched_setaffinity") else 0


def test_cells_run_a_number_at_a_time(tmp_path):
    folders, told, own = make(tmp_path, *["ok"] * 4), Told(), cores()
    Local(jobs=2, command=command)(folders, lambda: 0, told)
    spans = [folder.result()["outcome"]["span"] for folder in folders]
    most = max(sum(a <= start < b for a, b in spans) for start, _ in spans)
    assert most <= 2 and [folder.state() for folder in folders] == ["done"] * 4
    assert all(told.of(folder.path.name) == ["started", "done"] for folder in folders)
    assert {folder.result()["outcome"]["cores"] for folder in folders} == {half_of_the_cores()}
    assert cores() == own  # the driver keeps its own


def test_a_cell_that_is_left_has_the_cores_of_an_uninterrupted_grid(tmp_path):
    folders, told = make(tmp_path, *["ok"] * 3), Told()
    for folder, text in zip(folders[:2], ('{"outcome": {}}', "{}"), strict=True):  # done, damaged
        (folder.path / "result.json").write_text(text)
    Local(jobs=2, command=command)(folders, lambda: 0, told)
    assert told.events == [("started", "cell2"), ("done", "cell2")]
    assert (folders[1].path / "result.json").read_text() == "{}"
    assert folders[2].result()["outcome"]["cores"] == half_of_the_cores()


def test_a_failed_cell_is_tried_again_and_does_not_stop_others(tmp_path):
    folders, told = make(tmp_path, "fail", "die fail ok", "silent", "ok"), Told()
    Local(jobs=2, retries=2, command=command)(folders, lambda: 0, told)
    assert [folder.state() for folder in folders] == ["failed", "done", "failed", "done"]
    assert told.of("cell0") == ["started", "retried"] * 2 + ["started", "failed"]
    assert told.of("cell1") == ["started", "retried", "started", "retried", "started", "done"]
    assert folders[0].failure() == "ValueError: broken" and folders[0].starts() == 3
    assert folders[2].failure() == "exit code 3: no such module"
    reasons = [row.get("error") for row in folders[1].attempts() if row["event"] == "failed"]
    assert reasons == ["ended by SIGKILL", "ValueError: broken"]


def test_a_mistake_of_the_user_is_not_tried_again(tmp_path):
    (folder,), told = make(tmp_path, "mistake"), Told()
    Local(retries=2, command=command)([folder], lambda: 0, told)
    assert told.of("cell0") == ["started", "failed"] and folder.failure() == "no such data"


def test_stop_has_the_cells_save_and_starts_no_more(tmp_path):
    folders, told = make(tmp_path, "slow", "ok"), Told()
    begun = lambda: folders[0].starts() > 0  # noqa: E731
    Local(jobs=1, command=command)(folders, lambda: 15 * begun(), told)
    assert [folder.state() for folder in folders] == ["stopped", "waiting"]
    assert told.events == [("started", "cell0")]
    (folders[0].path / "go").touch()
    Local(jobs=1, command=command)(folders, lambda: 0, told)
    assert [folder.state() for folder in folders] == ["done", "done"]


def test_a_process_that_a_dead_driver_left_is_waited_for(tmp_path):
    (folder,), told = make(tmp_path, "slow"), Told()
    left = subprocess.Popen(command(folder.path))
    while not folder.held() or not folder.starts():
        time.sleep(0.01)
    assert folder.state() == "running" and folder.pid() == left.pid
    threading.Timer(0.5, (folder.path / "go").touch).start()
    Local(command=command)([folder], lambda: 0, told)
    assert told.events == [("adopted", "cell0"), ("done", "cell0")] and folder.starts() == 1
    assert left.wait() == 0


def test_such_a_process_is_stopped_too(tmp_path):
    (folder,), told = make(tmp_path, "slow"), Told()
    left = subprocess.Popen(command(folder.path))
    while not folder.held() or not folder.starts():
        time.sleep(0.01)
    Local(command=command)([folder], lambda: 2 * bool(told.events), told)
    assert left.wait() == 0 and folder.state() == "stopped"


def test_torn_notes_are_left_out(tmp_path):
    (folder,) = make(tmp_path, "ok")
    folder.note("start")
    with open(folder.path / "attempts.jsonl", "ab") as file:
        file.write(b'{"event": "fai')
    folder.note("failed", error="why")
    assert [row["event"] for row in folder.attempts()] == ["start", "failed"] and folder.failure() == "why"


def test_gpus_are_shared_out(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in slots(2)] == ["4,5", "6,7"]
    several = slots(8)
    assert [s.environment["CUDA_VISIBLE_DEVICES"] for s in several] == [*"4567"] * 2
    assert several[0].environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert slots(1)[0].environment == {} and visible_gpus({}) == visible_gpus({})


@pytest.mark.parametrize("options", [dict(jobs=0), dict(retries=-1), dict(jobs=10_000)])
def test_numbers_are_checked(options):
    with pytest.raises(UserError, match="--"):
        Local(**options)
