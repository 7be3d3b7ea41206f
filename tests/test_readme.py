"""What the README shows runs as it stands there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from celo_nnx import cli
from celo_nnx.config import load
from celo_nnx.evaluation.suites import load_suite
from celo_nnx.grids.grid_file import load_grid
from celo_nnx.grids.plan import plan

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]


def test_it_shows_code() -> None:
    assert not re.search(r"[A-Z]+_TABLE|TODO", README)
    assert len(PYTHON) == 6 and sum(line.startswith("celo-nnx") for line in SHELL) >= 3


@pytest.mark.parametrize("block", PYTHON, ids=range(len(PYTHON)))
def test_python_blocks_run(block: str, tmp_path: Path) -> None:
    script = tmp_path / "block.py"
    script.write_text(block)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("override", sorted(set(re.findall(r"`((?:meta|tasks)\.[\w.]+=[^`]+)`", README))))
def test_overrides_are_understood(override: str) -> None:
    load("celo2:fast_digits", [override])


@pytest.mark.parametrize("line", [s for s in SHELL if s.startswith("celo-nnx")])
def test_commands_are_understood(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    _, command, *rest = shlex.split(line)
    if command == "train":
        load(rest[0], rest[1 : rest.index("--run-dir")])
    elif command == "evaluate":
        args = cli._parse([command, *rest])
        load_suite(args.suite, args.overrides)
    elif command == "grid" and rest[0] != "plan":
        args = cli._parse([command, *rest])
        if rest[0] == "run":
            plan(load_grid(args.grid, args.overrides))
    else:
        assert cli.main([command, *rest]) == 0
        assert capsys.readouterr().out
