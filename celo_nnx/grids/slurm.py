"""The Slurm engine: cells as tasks of a job array, judged by their folders.

Jobs are submitted with submitit, which keeps its files in ``slurm/`` in the grid's folder, writes them anew
for each submission and reads them in the job alone: nothing here loads them. Which job works at which cell
stands in ``slurm.json``, so that a driver that is started again waits for jobs instead of submitting them
twice. Jobs do not end with the driver; ``celo-nnx grid cancel`` ends them. All jobs of a grid have a name
that no others have: a number alone may be another job's, once Slurm counts from 1 again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import io
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from celo_nnx.errors import UserError, require
from celo_nnx.files import read_json, write_json
from celo_nnx.grids.judge import Judge, Tell, check_retries, last_line
from celo_nnx.grids.local import cell_command
from celo_nnx.grids.slurm_job import CellJob
from celo_nnx.grids.store import LOG_NAME, CellFolder

JOBS_NAME, FOLDER_NAME = "slurm.json", "slurm"
KIND = "celo_nnx slurm jobs"
LOOK = 3.0  # seconds between two looks at the queue, which all users share
PATIENCE = 20  # looks that may fail one after the other, such as while the controller restarts
GONE = 2  # looks that must miss a job: one may fall between the end of a job and its requeue
MOST = 1000  # tasks of an array; Slurm's own limit is 1001 where it is not configured
WARNING = 90  # seconds before the time limit at which a cell is asked to save, where the limit is not shorter
TIMEOUTS = 1000  # time limits that a cell may run into; each goes on where the last one was stopped
JOB_ID = re.compile(r"[0-9]{1,12}(_[0-9]{1,6})?")
NAME = re.compile(r"celo-[0-9a-f]{12}")
OURS = "array output error open-mode signal requeue no-requeue job-name nodes ntasks ntasks-per-node time"
OURS += " cpus-per-task wrap parsable test-only wait"  # options of sbatch that are not a user's here


@dataclasses.dataclass
class Slurm:
    """Job arrays; fulfils :class:`celo_nnx.grids.local.Engine`.

    Attributes:
      folder: the grid's.
      minutes: time limit of a job. A cell that needs more is requeued and goes on.
      cpus: cores of a job.
      jobs: how many at a time; 0 leaves it to Slurm.
      retries: how many more attempts a cell has that fails or dies; a requeue is none.
      more: further options of ``sbatch``, such as ``{"partition": "gpu", "account": "me"}``.
      command: of one cell.

    Raises:
      UserError: a number out of range.

    Example:
      >>> Slurm(Path("runs/output"), minutes=60, more={"partition": "gpu"}).cpus
      1
    """

    folder: Path
    minutes: int = 60
    cpus: int = 1
    jobs: int = 0
    retries: int = 2
    more: Mapping[str, str] = dataclasses.field(default_factory=dict)
    command: Callable[[Path], list[str]] = cell_command

    def __post_init__(self) -> None:
        """Checks the numbers."""
        for name, value, least in (
            ("--time", self.minutes, 1),
            ("--cpus", self.cpus, 1),
            ("--jobs", self.jobs, 0),
        ):
            require(
                type(value) is int and least <= value <= 10**6, name, value, f"an integer of at least {least}"
            )
        check_retries(self.retries)
        for option, value in self.more.items():
            if option in OURS.split():
                raise UserError(f"{option} is not an option to be given to sbatch: the engine sets it")
            # A line break would make the rest of the text a command of the batch script.
            require(str(value).isprintable(), option, value, "printable text")

    def __call__(self, folders: Sequence[CellFolder], stop: Callable[[], int], tell: Tell) -> None:
        """See :class:`celo_nnx.grids.local.Engine`; what is queued when it returns goes on."""
        folders = [folder for folder in folders if not folder.has_result()]
        name, jobs = read_jobs(self.folder)
        if not name:  # before the first submission, so that its jobs are found whenever the driver dies
            name = f"celo-{secrets.token_hex(6)}"
            write_json(self.folder / JOBS_NAME, {"kind": KIND, "name": name, "jobs": jobs})
        judge, watch = Judge(self.retries, tell), Watch(folders, name)
        queue = in_queue(name)
        # Those whose driver died before it wrote down which is whose.
        _end([job for job in queue if job not in jobs.values()])
        for folder in folders:
            if jobs.get(folder.path.name) in queue or folder.held():
                tell("adopted", folder)
                watch.starts[folder] = folder.starts()
        self._submit([f for f in folders if f not in watch.starts], jobs, watch, tell)
        while watch.starts and not stop():
            over = watch.ended(jobs)
            why = functools.partial(self._ending, jobs)
            again = [f for f, starts in over if judge(f, starts, functools.partial(why, f, starts))]
            self._submit(again, jobs, watch, tell)
            _wait(stop)

    def _submit(self, folders: Sequence[CellFolder], jobs: dict[str, str], watch: Watch, tell: Tell) -> None:
        """Submits cells, an array for each thousand, and writes down which job is whose."""
        for first in range(0, len(folders), MOST):
            some = folders[first : first + MOST]
            starts = {folder: folder.starts() for folder in some}
            for folder, job in zip(some, self._array(some, watch.name), strict=True):
                jobs[folder.path.name] = job
            write_json(self.folder / JOBS_NAME, {"kind": KIND, "name": watch.name, "jobs": jobs})
            watch.starts |= starts
            for folder in some:
                tell("submitted", folder)

    def _ending(self, jobs: Mapping[str, str], folder: CellFolder, starts: int) -> str:
        """Why a job ended that noted no reason, in Slurm's words, the log's or submitit's."""
        theirs = last_line(self.folder / FOLDER_NAME / f"{jobs.get(folder.path.name)}_0_log.err", "srun:")
        begun = folder.starts() > starts
        what = "its job ended without a result" if begun else "its job ended before it began"
        mine = last_line(folder.path / LOG_NAME)
        said = theirs if theirs.startswith("slurmstepd") or not mine else mine
        return f"{what}: {said or 'without a word'}"

    def _array(self, folders: Sequence[CellFolder], name: str) -> list[str]:
        """Submits one array; returns the id of each cell's job."""
        import submitit

        path = str(self.folder.absolute())
        if re.search(r"[%\\]", path) or not path.isprintable():
            raise UserError(f"Slurm takes %, \\ and control characters in the path {path!r} amiss")
        warning = min(WARNING, 20 * self.minutes)
        executor = submitit.AutoExecutor(
            self.folder.absolute() / FOLDER_NAME, cluster="slurm", slurm_max_num_timeout=TIMEOUTS
        )
        executor.update_parameters(
            name=name,
            timeout_min=self.minutes,
            cpus_per_task=self.cpus,
            slurm_array_parallelism=self.jobs or MOST,
            slurm_signal_delay_s=warning,
            slurm_srun_args=[f"--cpus-per-task={self.cpus}"],  # a step takes one core otherwise since 22.05
            slurm_additional_parameters={"requeue": True} | dict(self.more),
        )
        tasks = [
            CellJob(self.command(f.path.absolute()), str(f.path.absolute() / LOG_NAME), warning)
            for f in folders
        ]
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # what sbatch says comes with the error
                return [job.job_id for job in executor.submit_array(tasks)]
        except (submitit.core.utils.FailedJobError, OSError) as error:
            raise UserError(f"Slurm refused the jobs: {_refusal(error)}") from None


def require_slurm() -> None:
    """Refuses a machine from which no job can be submitted.

    Raises:
      UserError: Slurm's programs are not on the path, or submitit is not installed.
    """
    for tool in ("sbatch", "squeue"):
        if shutil.which(tool) is None:
            raise UserError(
                f"there is no Slurm here: {tool} is not on the path; --engine local runs cells here"
            )
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--engine slurm needs submitit: pip install 'celo-nnx[slurm]'")


@dataclasses.dataclass
class Watch:
    """Cells whose jobs are waited for.

    Attributes:
      folders: of cells without a result, in their order.
      name: of their jobs.
      starts: by cell that is under way, how many it had before.
    """

    folders: list[CellFolder]
    name: str
    starts: dict[CellFolder, int] = dataclasses.field(default_factory=dict)
    _missed: dict[CellFolder, int] = dataclasses.field(default_factory=dict)
    _failures: int = 0

    def ended(self, jobs: Mapping[str, str]) -> list[tuple[CellFolder, int]]:
        """Returns the cells that are no longer under way, with their earlier starts."""
        try:
            queue = in_queue(self.name)
            self._failures = 0
        except UserError:
            self._failures += 1
            if self._failures > PATIENCE:
                raise
            return []
        out = []
        for folder in [f for f in self.folders if f in self.starts]:
            alive = jobs.get(folder.path.name) in queue or folder.held()
            self._missed[folder] = 0 if alive else self._missed.get(folder, 0) + 1
            if folder.state() in ("done", "damaged") or self._missed[folder] >= GONE:
                self._missed.pop(folder)
                out.append((folder, self.starts.pop(folder)))
        return out


def _refusal(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("sbatch:")]
    return (told or lines or ["it says nothing"])[0].removeprefix("sbatch: ").removeprefix("error: ")


def _wait(stop: Callable[[], int]) -> None:
    end = time.monotonic() + LOOK
    while time.monotonic() < end and not stop():
        time.sleep(0.1)


def in_queue(name: str) -> dict[str, str]:
    """Returns this user's jobs of a name by id, array tasks one by one, with their states.

    Raises:
      UserError: ``squeue`` fails.
    """
    words = ["squeue", "--noheader", "--array", "--user", str(os.getuid()), "--name", name]
    rows = (line.split() for line in _call([*words, "--format", "%i %T"]).splitlines())
    return {row[0]: row[1] for row in rows if len(row) == 2 and JOB_ID.fullmatch(row[0])}


def read_jobs(folder: Path) -> tuple[str, dict[str, str]]:
    """Returns the name of a grid's jobs, and the job of every cell that was submitted by the cell's id.

    Raises:
      UserError: ``slurm.json`` is damaged.
    """
    content = read_json(folder / JOBS_NAME)
    if content is None:
        return "", {}
    content = content if isinstance(content, dict) and content.get("kind") == KIND else {}
    name, jobs = content.get("name"), content.get("jobs")
    if (
        not (isinstance(name, str) and NAME.fullmatch(name) and isinstance(jobs, dict))
        or not all(isinstance(job, str) and JOB_ID.fullmatch(job) for job in jobs.values())
        or not all(cell.isalnum() for cell in jobs)
    ):
        raise UserError(f"{folder / JOBS_NAME} is damaged: it does not list jobs by cell")
    return name, dict(jobs)


def queued(folder: Path) -> dict[str, str]:
    """Returns the state of cells' jobs by the cell's id; nothing where Slurm cannot be asked.

    Example:
      >>> queued(Path("runs/output"))
      {}
    """
    name, jobs = read_jobs(folder)
    if not jobs or shutil.which("squeue") is None:
        return {}
    try:
        queue = in_queue(name)
    except UserError:
        return {}
    return {cell: queue[job] for cell, job in jobs.items() if job in queue}


def cancel(folder: Path) -> int:
    """Ends the jobs of a grid that are queued or run; cells save.

    Returns:
      How many.

    Raises:
      UserError: Slurm is not here, or refuses.
    """
    name, _ = read_jobs(folder)
    if not name:
        return 0
    if shutil.which("scancel") is None:
        raise UserError(
            "there is no Slurm here: scancel is not on the path; cancel where the jobs were submitted"
        )
    left = list(in_queue(name))
    _end(left)
    return len(left)


def _end(jobs: Sequence[str]) -> None:
    for first in range(0, len(jobs), MOST):
        _call(["scancel", "--quiet", *jobs[first : first + MOST]])


def _call(words: Sequence[str]) -> str:
    # Such variables of a user may hide jobs.
    environment = {key: x for key, x in os.environ.items() if not key.startswith(("SQUEUE_", "SCANCEL_"))}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{words[0]} cannot be asked: {error}") from None
    if done.returncode:
        text = done.stderr.strip().splitlines() or ["no reason"]
        raise UserError(f"{words[0]} fails: {text[0]}")
    return done.stdout
