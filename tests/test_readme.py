"""The README has the two commands that all starts from; its code is run by docs/test_pages."""

from __future__ import annotations

import re
from pathlib import Path

README = (Path(__file__).resolve().parents[1] / "README.md").read_text()


def test_it_has_the_two_commands() -> None:
    commands = re.findall(r"<!-- command (?:one|two) -->\n```bash\n(.*)\n```", README)
    assert len(commands) == 2 and all(line.startswith("python3 -m venv .venv && ") for line in commands)
    assert commands[0].endswith(" quickstart") and "-m pytest" in commands[1]


def test_it_is_short_and_whole() -> None:
    assert not re.search(r"[A-Z]+_TABLE|TODO", README)
    assert len(README.splitlines()) < 150
