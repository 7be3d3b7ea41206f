"""Watching runs: exact pictures, names as text, quiet ends, mistakes in one line, no JAX."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import made_run
import numpy as np
import pytest
from rich.console import Console

from celo_nnx import lock, run_report, watch
from celo_nnx.cli import main
from celo_nnx.run_folder import RunFolder

BEGIN = made_run.BEGIN


def printed(what: Any, width: int) -> list[str]:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(what)
    return [line.rstrip() for line in capture.get().splitlines()]


def test_one_run_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    losses = [3.0, 3.0, 2.0, 2.0, None, 1.0, 1.0, 1.0]
    folder = made_run.make(Path("a"), made_run.course(losses), starts=[(BEGIN, 0), (BEGIN + 1, 2)])
    run = RunFolder(folder)
    with lock.hold(folder):
        lines = printed(watch.full(run, BEGIN + 15, 40, 20), 80)
    assert "\n".join(lines) == "\n".join(
        [
            "a  running",
            "iteration 8 of 100 (8.0%)  2.00 it/s  left 0:46  last heard of 0:02 ago",
            "resumed once, last from iteration 2",
            "",
            "3 ⠉⠉⠉⠉⠉⠉⠢⡀",
            "         ⠈⠢⢄",
            "            ⠑⠤⠤⠤⠤⠤⠄",
            "",
            "1                            ⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀⣀",
            "  1                                    8",
            "",
            "mean of 4  loss  change  non-finite  course",
            "meta-loss     1    -1.5           1  ██▅▅ ▁▁▁",
            "one         1.5    -1.5           1  ██▅▅ ▁▁▁",
            "two         0.5    -1.5           0  ██▅▅ ▁▁▁",
        ]
    )


def test_before_the_first_row_and_after_one(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", starts=[])
    lines = printed(watch.full(RunFolder(folder), BEGIN, 60, 20), 200)
    assert lines == [f"{folder}  interrupted", "iteration 0 of 100 (0.0%)"]
    made_run.append(folder, [made_run.row(1, 1.25, BEGIN, phase="rule")])
    lines = printed(watch.full(RunFolder(folder), BEGIN + 61, 60, 20), 200)
    assert lines == [
        f"{folder}  interrupted  phase rule",
        "iteration 1 of 100 (1.0%)  last heard of 1:01 ago",
        "",
        "loss       loss  change  non-finite  course",
        "meta-loss  1.25       -           0  ▅",
        "one        1.75       -           0  ▅",
        "two        0.75       -           0  ▅",
    ]


def test_several_runs(tmp_path: Path) -> None:
    rows = made_run.course([4.0, 4.0, None, 2.0], begin=BEGIN)
    one = made_run.make(tmp_path / "one", rows, total=4)
    two = made_run.make(tmp_path / "two", [r | {"phase": "rule"} for r in rows], total=3000)
    runs = [RunFolder(one), RunFolder(two)]
    with lock.hold(two):
        narrow, wide = (printed(watch.table(runs, BEGIN + 5, width), width) for width in (80, 120))
    short = [f"…{str(path)[-14:]}" for path in (one, two)]
    assert narrow == [
        "run             state    iteration done  left meta-loss nan course",
        f"{short[0]} finished         4 100%     -         2   1 ██ ▁",
        f"{short[1]} running          4   0% 24:58         2   1 ██ ▁",
    ]
    assert wide[0].split() == "run state iteration done left meta-loss it/s change nan course".split()
    assert wide[2].split()[1:] == "running rule 4 0% 24:58 2 2.00 -2 1 ██ ▁".split()
    assert max(map(len, narrow)) <= 80 and max(map(len, wide)) <= 120


def test_curves() -> None:
    x = np.arange(1, 6)
    assert watch.curve(np.full(5, 2.5), 24, 4, x) == [
        "",
        "2.5 ⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤⠤",
        "",
        "    1                  5",
    ]
    assert watch.curve(np.full(5, np.nan), 20, 3, x)[-1].split() == ["1", "5"]
    steep = watch.curve(np.array([1000.0, 100.0, 10.0, 1.0, 1.0]), 40, 6, x)
    assert "logarithmic" in steep[-1] and "logarithmic" not in watch.curve(np.array([9.9, 1.0]), 40, 6, x)[-1]
    for width, height in ((20, 3), (77, 12)):
        lines = watch.curve(np.random.default_rng(0).normal(size=1000), width, height, np.arange(1000))
        assert len(lines) == height and max(map(len, lines)) <= width


def test_what_was_not_finite_in_theta_is_said(tmp_path: Path) -> None:
    rows = [made_run.row(i, 1.0, made_run.BEGIN + i) for i in range(1, 5)]
    rows[2] |= {"nonfinite_gradient": {"one": 0, "two": 3}, "nonfinite_theta": 2}
    run = RunFolder(made_run.make(tmp_path / "a", rows))
    said = [
        "3 estimates of pairs were not finite and left out of the gradient (two 3).",
        "2 entries of theta or of its gradient were not finite.",
    ]
    assert [str(line) for line in watch.notes(run)] == said
    assert set(said) <= set(run_report.summary(run, "finished"))


def test_a_line_of_dots_has_no_holes() -> None:
    """Every column's dots touch those of the next: a jump is drawn as a vertical line."""
    values = np.random.default_rng(3).normal(size=60)
    height = 5
    lines = watch.braille(values, height)
    lit = np.zeros((4 * height, 60), bool)
    for i, line in enumerate(lines):
        for j, char in enumerate(line):
            bits = 0 if char == " " else ord(char) - 0x2800
            for side in (0, 1):
                for k, dot in enumerate(watch.DOTS[side]):
                    lit[4 * i + k, 2 * j + side] = bool(bits & dot)
    low, high = values.min(), values.max()
    for x in range(60):
        ys = np.flatnonzero(lit[:, x])
        level = round((1 - (values[x] - low) / (high - low)) * (4 * height - 1))
        assert level in ys and (np.diff(ys) == 1).all()
        if x:
            before = np.flatnonzero(lit[:, x - 1])
            assert min(abs(a - b) for a in ys for b in before) <= 1


def test_names_are_text(tmp_path: Path) -> None:
    """Neither a terminal's escapes nor rich's markup take effect."""
    nasty = "\x1b[2J[red]x[/red]\n"
    rows = [made_run.row(i, 1.0, BEGIN, phase=nasty) | {"family_loss": {nasty: 2.0}} for i in (1, 2)]
    folder = made_run.make(tmp_path / "[bold]a\x1b[2J", rows)
    for what in (
        watch.full(RunFolder(folder), BEGIN, 60, 20),
        watch.table([RunFolder(folder)] * 2, BEGIN, 200),
    ):
        text = "\n".join(printed(what, 200))
        assert "\x1b" not in text and "[red]x[/red]\\n" in text and "\\x1b[2J" in text


def test_many_families_fit_a_low_terminal(tmp_path: Path) -> None:
    rows = [made_run.row(i, 1.0, BEGIN) | {"family_loss": {f"f{k}": 1.0 for k in range(50)}} for i in (1, 2)]
    lines = printed(watch.full(RunFolder(made_run.make(tmp_path / "a", rows)), BEGIN, 80, 24), 80)
    assert len(lines) <= 24 and lines[-1] == "and 42 families more"


@pytest.mark.parametrize("command", ["watch", "report"])
@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "does not exist; name the run folder"),
        ("file", "is a file; name the run folder"),
        ("empty", "is not a run folder: it holds no config.json"),
        ("foreign", "is not a run folder: it has a config.json of something else"),
        ("negative", "is not a run folder: it has a config.json of something else"),
        ("torn", "config.json is not readable JSON"),
        ("deep", "config.json is not readable JSON"),
        ("info", "run_info.json is not readable JSON"),
        ("log", "metrics.jsonl is not a file"),
    ],
)
def test_mistakes(
    command: str, damage: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([1.0]))
    texts = {
        "foreign": "[]",
        "negative": '{"run": {"iterations": -1}}',
        "torn": '{"run',
        "deep": "[" * 100_000,
    }
    if damage in ("missing", "file", "empty"):
        shutil.rmtree(folder)
        if damage == "file":
            folder.write_text("")
        if damage == "empty":
            folder.mkdir()
    elif damage == "info":
        (folder / "run_info.json").write_text("{")
    elif damage == "log":
        (folder / "metrics.jsonl").unlink()
        (folder / "metrics.jsonl").mkdir()
    else:
        (folder / "config.json").write_text(texts[damage])
    assert main([command, str(folder)]) == 2
    captured = capsys.readouterr()
    assert words in captured.err and captured.err.count("\n") == 1 and captured.out == ""
    assert not list(tmp_path.rglob("report.html*"))


@pytest.mark.parametrize("every", ["0", "nan", "1e9", "soon"])
def test_every_is_checked(every: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(made_run.make(tmp_path / "a")), "--every", every]) == 2
    assert "every" in capsys.readouterr().err


def test_plain_text_once_without_jax_and_without_writing(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([2.0] * 4))
    before = sorted(os.listdir(folder))
    code = f"import sys\nfrom celo_nnx.cli import main\ncode = main(['watch', {str(folder)!r}])\n"
    code += "print('code', code, 'jax' in sys.modules)"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}  # braille has no place there: no reason to fail
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60
    )
    assert out.stdout.splitlines()[-1] == "code 0 False", out.stderr
    assert "iteration 4 of 100" in out.stdout and "\x1b" not in out.stdout
    assert sorted(os.listdir(folder)) == before


class Terminal:
    """A command on a terminal of 30 lines of 90 characters."""

    def __init__(self, *argv: str) -> None:
        self.fd, other = pty.openpty()
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 90, 0, 0))
        # A terminal's own child heeds Ctrl-C; a background job, such as these tests may be, has it ignored.
        code = (
            "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
            "from celo_nnx.cli import main; sys.exit(main(sys.argv[1:]))"
        )
        command = [sys.executable, "-c", code, *argv]
        environment = os.environ | {"TERM": "xterm", "COLUMNS": "90", "LINES": "30"}
        self.child = subprocess.Popen(command, stdin=other, stdout=other, stderr=other, env=environment)
        os.close(other)
        self.text = ""

    def until(self, words: str) -> None:
        """Reads until the words have been shown; empty: to the end. A minute at most."""
        begin = time.monotonic()
        while not words or words not in self.text:
            assert time.monotonic() < begin + 60, self.text[-2000:]
            assert select.select([self.fd], [], [], 60)[0], self.text
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # a terminal's end, on Linux
                data = b""
            if not data:
                assert not words, self.text
                return
            self.text += data.decode("utf-8", "replace")

    def wait(self) -> int:
        self.until("")
        os.close(self.fd)
        return self.child.wait(60)


def test_it_follows_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([2.0] * 4))
    terminal = Terminal("watch", str(folder), "--every", "0.1")
    terminal.until("iteration 4 of 100")
    made_run.append(folder, made_run.course([1.0] * 3, first=5))
    terminal.until("iteration 7 of 100")
    terminal.child.send_signal(signal.SIGINT)
    assert terminal.wait() == 0 and "Traceback" not in terminal.text and "error" not in terminal.text


def test_it_ends_with_the_last_run(tmp_path: Path) -> None:
    folders = [
        made_run.make(tmp_path / n, made_run.course([2.0] * 4), total=t) for n, t in (("a", 4), ("b", 6))
    ]
    terminal = Terminal("watch", *map(str, folders), "--every", "0.1")
    terminal.until("interrupted")
    made_run.append(folders[1], made_run.course([1.0] * 2, first=5))
    assert terminal.wait() == 0 and "100%" in terminal.text


def test_a_folder_that_vanishes_is_told(tmp_path: Path) -> None:
    folder = made_run.make(tmp_path / "a", made_run.course([2.0] * 4))
    terminal = Terminal("watch", str(folder), "--every", "0.1")
    terminal.until("iteration 4 of 100")
    os.rename(folder, tmp_path / "b")
    assert terminal.wait() == 2 and "does not exist" in terminal.text and "Traceback" not in terminal.text
