"""The Slurm engine: with programs in Slurm's place, and, where there is one, in a real Slurm."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import made_grid
import pytest

from celo_nnx.cli import main
from celo_nnx.errors import UserError
from celo_nnx.grids import slurm, slurm_job
from celo_nnx.grids.grid_file import load_grid
from celo_nnx.grids.plan import plan
from celo_nnx.grids.slurm import Slurm
from celo_nnx.grids.slurm_job import CellJob
from celo_nnx.grids.store import CellFolder, read_grid, write_grid

# Now, and not inside a test: it configures logging anew, and absl then closes the standard error it knows
# unless that is the present one, which under capsys it is not.
with contextlib.suppress(ImportError):
    import submitit  # noqa: F401

TESTS = Path(__file__).resolve().parents[1]


def command(path: Path) -> list[str]:
    return [sys.executable, str(TESTS / "stub_cell.py"), str(path)]


NAME = "celo-0123456789ab"


class Cluster:
    """Runs tasks at once, as processes of this machine, and answers as ``squeue`` does."""

    def __init__(self) -> None:
        self.arrays: list[list[str]] = []
        self.processes: dict[str, subprocess.Popen] = {}
        self.down = 0  # questions that are not answered

    def array(self, folders: list[CellFolder]) -> list[str]:
        ids = [f"{len(self.arrays) + 1}_{i}" for i in range(len(folders))]
        self.arrays.append([folder.path.name for folder in folders])
        for job, folder in zip(ids, folders, strict=True):
            with open(folder.path / "log", "ab") as log:
                self.processes[job] = subprocess.Popen(command(folder.path), stdout=log, stderr=log)
        return ids

    def queue(self, name: str) -> dict[str, str]:
        if self.down:
            self.down -= 1
            raise UserError("squeue fails: no controller")
        return {job: "RUNNING" for job, process in self.processes.items() if process.poll() is None}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = Cluster()
    monkeypatch.setattr(slurm, "LOOK", 0.05)
    monkeypatch.setattr(slurm, "in_queue", made.queue)
    monkeypatch.setattr(slurm.shutil, "which", lambda tool: f"/bin/{tool}")
    monkeypatch.setattr(Slurm, "_array", lambda self, folders, name: made.array(list(folders)))
    yield made
    for process in made.processes.values():
        process.kill()
        process.wait()


def cells(tmp_path: Path, *scripts: str) -> list[CellFolder]:
    folders = [CellFolder(tmp_path / "cells" / f"cell{i}") for i in range(len(scripts))]
    for folder, script in zip(folders, scripts, strict=True):
        folder.path.mkdir(parents=True)
        (folder.path / "script").write_text(script)
    return folders


def told() -> tuple[list[tuple[str, str]], Any]:
    events: list[tuple[str, str]] = []
    return events, lambda event, folder: events.append((event, folder.path.name))


def test_cells_are_one_array_and_failures_are_submitted_again(tmp_path, cluster):
    folders = cells(tmp_path, "ok", "die ok", "fail", "silent")
    (tmp_path / "slurm").mkdir()
    killed = "slurmstepd: error: Detected 1 oom_kill event\nsrun: error: task 0: Killed\n"
    (tmp_path / "slurm" / "1_1_0_log.err").write_text(killed)
    events, tell = told()
    breaks = iter([3])  # the controller restarts
    stop = lambda: setattr(cluster, "down", next(breaks, cluster.down)) or 0  # noqa: E731
    Slurm(tmp_path, retries=1)(folders, stop, tell)
    assert not cluster.down
    assert [folder.state() for folder in folders] == ["done", "done", "failed", "failed"]
    assert cluster.arrays[0] == ["cell0", "cell1", "cell2", "cell3"]
    assert sorted(sum(cluster.arrays[1:], [])) == ["cell1", "cell2", "cell3"]
    assert [event for event, name in events if name == "cell1"] == [
        "submitted",
        "retried",
        "submitted",
        "done",
    ]
    assert folders[1].attempts()[1]["error"] == f"its job ended without a result: {killed.splitlines()[0]}"
    assert folders[2].failure() == "ValueError: broken"
    assert folders[3].failure() == "its job ended before it began: no such module"


def test_a_driver_waits_for_the_jobs_of_an_earlier_one(tmp_path, cluster):
    folders = cells(tmp_path, "slow", "ok")
    events, tell = told()
    Slurm(tmp_path)(folders, lambda: 15 * (folders[1].state() == "done" and folders[0].starts() > 0), tell)
    assert folders[0].state() == "running" and json.loads((tmp_path / "slurm.json").read_text())["jobs"]
    (folders[0].path / "go").touch()
    Slurm(tmp_path)(folders, lambda: 0, tell)
    assert len(cluster.arrays) == 1 and folders[0].starts() == 1
    assert [event for event, name in events if name == "cell0"] == ["submitted", "adopted", "done"]


def test_jobs_that_a_driver_did_not_live_to_write_down_are_ended(tmp_path, cluster, monkeypatch):
    folders = cells(tmp_path, "ok")
    content = {"kind": slurm.KIND, "name": NAME, "jobs": {"cell0": "3_0"}}
    (tmp_path / "slurm.json").write_text(json.dumps(content))
    program(tmp_path, "scancel", f'echo "$@" > {tmp_path}/cancelled')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    before = cluster.queue
    monkeypatch.setattr(slurm, "in_queue", lambda name: before(name) | {"4_0": "PENDING"})
    Slurm(tmp_path)(folders, lambda: 0, lambda *_: None)
    assert (tmp_path / "cancelled").read_text().split() == ["--quiet", "4_0"]
    assert len(cluster.arrays) == 1 and folders[0].state() == "done"


def test_a_queue_that_never_answers_ends_the_driver(tmp_path, cluster):
    folders = cells(tmp_path, "slow")
    with pytest.raises(UserError, match="squeue fails: no controller"):
        Slurm(tmp_path)(folders, lambda: setattr(cluster, "down", 10**6) or 0, lambda *_: None)


@pytest.mark.parametrize(
    "content",
    [
        {"kind": "another", "jobs": {}},
        {"kind": slurm.KIND, "jobs": {}},
        {"kind": slurm.KIND, "name": f"{NAME},other", "jobs": {}},
        {"kind": slurm.KIND, "name": NAME, "jobs": ["1"]},
        {"kind": slurm.KIND, "name": NAME, "jobs": {"a": 1}},
        {"kind": slurm.KIND, "name": NAME, "jobs": {"a": "1; rm -r x"}},
        {"kind": slurm.KIND, "name": NAME, "jobs": {"../a": "1"}},
        [],
    ],
)
def test_a_list_of_jobs_that_is_none_is_refused(tmp_path, content):
    (tmp_path / "slurm.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="slurm.json is damaged"):
        slurm.read_jobs(tmp_path)


# --- the job ----------------------------------------------------------------------------------------------


# macOS has it from Python 3.13 on. Slurm's jobs run on Linux; the rest of the engine is tested everywhere.
waits = pytest.mark.skipif(not hasattr(os, "waitid"), reason="a job waits by os.waitid, which is not here")


@waits
def test_a_job_outlives_the_warning_and_saves_when_it_is_asked(tmp_path):
    pytest.importorskip("submitit")
    (folder,) = cells(tmp_path, "slow")
    text = (  # as submitit's process, to which the signal comes as well as to the command
        "import os, signal, sys\n"
        "from celo_nnx.grids.slurm_job import CellJob\n"
        "job = CellJob(sys.argv[2:], sys.argv[1], 60.0)\n"
        "signal.signal(signal.SIGUSR2, lambda *_: (job.checkpoint(), os._exit(7)))\n"
        "job()\n"
    )
    words = [sys.executable, "-c", text, str(folder.path / "log"), *command(folder.path)]
    process = subprocess.Popen(words)
    while not folder.starts():
        time.sleep(0.02)
    os.kill(folder.pid(), signal.SIGUSR2)
    time.sleep(0.2)
    assert folder.held(), "the command has ignored the warning"
    process.send_signal(signal.SIGUSR2)
    assert process.wait(30) == 7
    assert [row["event"] for row in folder.attempts()] == ["start", "stopped"]


def test_what_runs_after_a_requeue_is_the_same_command_unless_nothing_is_ever_saved(tmp_path):
    pytest.importorskip("submitit")
    (folder,) = cells(tmp_path, "ok")
    job = CellJob(["a", "b"], str(folder.path / "log"), 60.0)
    (folder.path / "run" / "checkpoints" / "2").mkdir(parents=True)
    idle = []
    while (delayed := job.checkpoint()) is not None:
        assert folder.failure() == ""
        again = delayed.function
        assert (again.command, again.log, again.warning) == (job.command, job.log, job.warning)
        again._before = slurm_job.saved(again.log)  # as when it runs
        job = again
        idle.append(job.idle)
    assert idle == [0, 1, 2]  # the first one had saved something
    assert "3 times in a row, the time limit came before anything was saved" in folder.failure()


@waits
def test_a_preempted_job_has_its_cell_save_and_leaves_the_rest_to_slurm(tmp_path):
    (folder,) = cells(tmp_path, "slow")
    text = "import sys; from celo_nnx.grids import slurm_job; slurm_job.GRACE = 0.2\n"
    text += "slurm_job.CellJob(sys.argv[2:], sys.argv[1], 60.0)()\n"
    words = [sys.executable, "-c", text, str(folder.path / "log"), *command(folder.path)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    while not folder.starts():
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "stopped by SIGTERM" in errors
    assert [row["event"] for row in folder.attempts()] == ["start", "stopped"]


# --- commands ---------------------------------------------------------------------------------------------


def program(folder: Path, name: str, text: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{text}\n")
    (folder / name).chmod(0o755)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["grid", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_mistakes_are_told_in_one_line(tmp_path, capsys, monkeypatch):
    words = ("run", made_grid.file(tmp_path), "--run-dir", str(tmp_path / "g"))
    monkeypatch.setenv("PATH", str(tmp_path))
    ours = (*words, "--engine", "slurm")
    assert "--partition is for --engine slurm" in refused(capsys, *words, "--partition", "gpu")
    assert "--sbatch 'x': give OPTION=VALUE" in refused(capsys, *ours, "--sbatch", "x")
    assert "--time '1h': give minutes, H:MM:SS" in refused(capsys, *ours, "--time", "1h")
    assert "array is not an option to be given" in refused(capsys, *ours, "--sbatch", "array=1-2")
    assert "must be printable text" in refused(capsys, *ours, "--partition", "a\nrm")
    assert "--time = 0 is out of range" in refused(capsys, *ours, "--time", "0")
    assert "there is no Slurm here: sbatch is not on the path" in refused(capsys, *ours)


def test_what_sbatch_refuses_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    pytest.importorskip("submitit")
    text = 'echo "sbatch: error: invalid partition specified: nosuch" >&2; exit 1'
    for name, content in (("sbatch", text), ("squeue", "exit 0"), ("srun", "exit 0")):
        program(tmp_path, name, content)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    file, folder = made_grid.file(tmp_path), tmp_path / "g"
    words = ("run", file, "--run-dir", str(folder), "--engine", "slurm", "--partition", "nosuch")
    assert main(["grid", *words]) == 2
    assert (
        "Slurm refused the jobs: invalid partition specified: nosuch"
        in capsys.readouterr().err.splitlines()[-1]
    )
    (script,) = (folder / "slurm").glob("*.sh")
    text = script.read_text()
    assert "#SBATCH --partition=nosuch" in text and "#SBATCH --array=0-11%" in text
    assert re.search(r"^srun .*--cpus-per-task=1 ", text, re.MULTILINE)
    words = (*words[:2], "--run-dir", str(tmp_path / "50%"), *words[4:])
    assert main(["grid", *words]) == 2 and "amiss" in capsys.readouterr().err


def test_cancel_ends_the_jobs_that_are_left(tmp_path, capsys, monkeypatch):
    file, folder = made_grid.file(tmp_path), tmp_path / "g"
    folder.mkdir()
    write_grid(folder, load_grid(file), plan(load_grid(file)), "")
    ids = [entry.id for entry in read_grid(folder).cells]
    jobs = {"kind": slurm.KIND, "name": NAME, "jobs": {ids[0]: "7_0", ids[1]: "7_1", ids[2]: "7_2"}}
    (folder / "slurm.json").write_text(json.dumps(jobs))
    named = (
        f'case "$*" in *"--name {NAME} "*) ;; *) echo 7_0 RUNNING;; esac'  # a number of another grid's job
    )
    program(tmp_path, "squeue", f"{named}; echo '7_1 RUNNING'; echo '7_2 PENDING'; echo 'x --help'")
    program(tmp_path, "scancel", f'echo "$@" > {tmp_path}/cancelled')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert main(["grid", "status", str(folder)]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert lines[ids[1]].endswith("Slurm: running") and lines[ids[2]].endswith("Slurm: pending")
    assert "Slurm" not in lines[ids[0]]
    assert main(["grid", "cancel", str(folder)]) == 0
    assert "2 jobs were ended in Slurm" in capsys.readouterr().out
    assert (tmp_path / "cancelled").read_text().split() == ["--quiet", "7_1", "7_2"]


# --- a real Slurm -----------------------------------------------------------------------------------------


def start(program: list[str], *words: str, **environment: str) -> subprocess.Popen:
    options: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*program, *words], env=os.environ | environment, **options)


def finish(driver: subprocess.Popen, count: int) -> None:
    out, errors = driver.communicate(timeout=1800)
    assert driver.returncode == 0 and json.loads(out)["done"] == count, errors


def outcomes(folder: Path) -> dict[str, Any]:
    return {entry.name: entry.folder.result()["outcome"] for entry in read_grid(folder).cells}


def jobs_now() -> dict[str, str]:
    words = ["squeue", "--noheader", "--array", "--format", "%i %r"]
    rows = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    return dict(row.split(maxsplit=1) for row in rows)


def need_slurm() -> None:
    if shutil.which("sbatch") is None or subprocess.run(["sinfo"], capture_output=True).returncode:
        pytest.skip("no Slurm answers here (sbatch, SLURM_CONF)")


def through_slurm(program: list[str], file: str, tmp_path: Path, slow: str = "") -> None:
    """A grid with a requeued cell, one beyond its time limit, and a killed driver, against a local run.

    Args:
      program: ``celo-nnx grid`` or a stand-in.
      file: of the grid.
      slow: seconds of a dispatch of the first cell, so that it lasts longer than a minute.
    """
    need_slurm()
    first, requeued = [cell.id for cell in plan(load_grid(file))][:2]
    folder = tmp_path / "slurm"
    words = ["run", file, "--run-dir", str(folder), "--engine", "slurm", "--time", "1", "--jobs", "2"]
    environment = {f"FAKE_PAUSE_{first}": slow or "0", f"FAKE_PAUSE_{requeued}": "3.0"}
    driver = start(program, *words, **environment)
    cell = {name: CellFolder(folder / "cells" / name) for name in (first, requeued)}
    begun = time.monotonic()
    while not (cell[requeued].run_dir / "metrics.jsonl").exists() and time.monotonic() < begun + 600:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.1)
    jobs = slurm.read_jobs(folder)[1]
    array = {job.split("_")[0] for job in jobs.values()}
    assert len(array) == 1 and len(jobs) == 12, "one job array"
    subprocess.run(["scontrol", "requeue", jobs[requeued]], check=True)
    driver.kill()
    driver.communicate()
    driver, waiting = start(program, *words, **environment), {}
    while driver.poll() is None and time.monotonic() < begun + 1500:
        # A requeued job waits for two minutes. Some of that is needed: started at once, the end of its
        # last run is taken for that of the new one.
        waiting = {job: waiting.get(job, 0) + 1 for job, why in jobs_now().items() if why == "BeginTime"}
        for job in [job for job, seconds in waiting.items() if seconds > 10]:
            subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], capture_output=True)
        time.sleep(1.0)
    finish(driver, 12)
    assert slurm.read_jobs(folder)[1] == jobs, "no cell was submitted twice"
    assert cell[requeued].starts() >= 2
    assert not slow or cell[first].starts() >= 2, "the time limit has come"
    ends = [[row["event"] for row in e.folder.attempts()].count("done") for e in read_grid(folder).cells]
    assert ends == [1] * 12
    finish(start(program, "run", file, "--run-dir", str(tmp_path / "local"), "--jobs", "2"), 12)
    assert outcomes(folder) == outcomes(tmp_path / "local")


@pytest.mark.slurm
def test_a_grid_through_slurm(tmp_path):
    file = made_grid.file(tmp_path)
    through_slurm([sys.executable, str(TESTS / "fake_grid.py")], file, tmp_path, slow="15.0")


REAL = '''
"""One cell of the smallest sizes."""

from ml_collections import ConfigDict


def get_config():
    few = "meta.estimator.pairs=2 meta.estimator.truncation=2 run.iterations_per_dispatch=2 tasks.hidden=(4,)"
    few += " tasks.batch_size=4 run.devices=1 optimizer.update_rule.hidden=(2,2) run.iterations=4"
    few += " optimizer.features.groups=('gradient','momentum')"
    return ConfigDict(
        dict(
            question="Does it train?",
            base="celo2_base:fast_digits",
            overrides=tuple(few.split()),
            axes=(("rate", {"1e-3": ("meta.optimizer.learning_rate=1e-3",)}),),
            seeds=(0,),
        )
    )
'''


@pytest.mark.slurm
def test_a_real_cell_has_the_bits_of_a_local_one(tmp_path):
    need_slurm()
    file = made_grid.file(tmp_path, REAL)
    program = [sys.executable, "-m", "celo_nnx", "grid"]
    for name, engine in (("slurm", ["--engine", "slurm", "--time", "10"]), ("local", [])):
        finish(start(program, "run", file, "--run-dir", str(tmp_path / name), *engine), 1)
    assert outcomes(tmp_path / "slurm") == outcomes(tmp_path / "local")


@pytest.mark.slurm
@pytest.mark.drill
def test_a_grid_of_real_cells_through_slurm(tmp_path):
    file = made_grid.file(tmp_path, made_grid.TWELVE)
    through_slurm([sys.executable, "-m", "celo_nnx", "grid"], file, tmp_path)
