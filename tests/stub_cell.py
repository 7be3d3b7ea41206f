"""Keeps to the protocol of ``celo-nnx grid cell`` without JAX, for tests of engines: ``stub_cell.py DIR``.

A file ``script`` in the cell's folder says what each start does, a word each, the last one again and again:
``ok``, ``fail``, ``mistake`` (a failure that the user has to mend), ``die`` (SIGKILL), ``silent`` (exit code
3 before it notes a start) or ``slow``, which works until it is asked to stop or a file ``go`` lies there.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from pathlib import Path

from celo_nnx import lock


def note(folder: Path, event: str, **more: str | bool) -> None:
    row = {"event": event, "time": time.time(), "pid": os.getpid(), "host": socket.gethostname()} | more
    with open(folder / "attempts.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")


def main(folder: Path) -> int:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    words = (folder / "script").read_text().split() if (folder / "script").exists() else ["ok"]
    path = folder / "attempts.jsonl"
    before = path.read_text().count('"start"') if path.exists() else 0
    word = words[min(before, len(words) - 1)]
    if word == "silent":
        print("no such module")
        return 3
    with lock.hold(folder):
        begin = time.time()
        note(folder, "start")
        if word == "fail":
            note(folder, "failed", error="ValueError: broken")
            return 1
        if word == "mistake":
            note(folder, "failed", error="no such data", mistake=True)
            return 2
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        while word == "slow" and not (folder / "go").exists():
            if asked:
                note(folder, "stopped")
                return 0
            time.sleep(0.02)
        time.sleep(0.1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
        outcome = {"meta_loss": 1.0, "iterations": 1, "span": [begin, time.time()], "cores": cores}
        (folder / "result.json").write_text(json.dumps({"outcome": outcome, "cost": {}}))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
