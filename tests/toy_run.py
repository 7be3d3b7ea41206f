"""A run of the toy inner problems with the real estimator, loop, folder and checkpoints, on many devices.

Also a program, which a launcher may start several times: ``python tests/toy_run.py RUN_DIR ITERATIONS
[KEY=VALUE ...]`` prints a JSON line; a key is one of ``run`` or ``pause``, seconds between dispatches.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import fake_run

import celo_nnx
from celo_nnx import cli, processes, training

sys.path.insert(0, str(Path(__file__).parent / "meta"))


def assembled(pause: float = 0.0) -> Any:
    """Patches :func:`celo_nnx.training.assemble` to give the toy trainer."""

    def assemble(config: Any, devices: int, resumed: bool = False, read: Any = None) -> training.Work:
        import jax
        import toy

        trainer = toy.trainer(devices, tasks=1, per=config["run"]["iterations_per_dispatch"])
        run = trainer.run

        def slow(state: Any, n: int) -> Any:
            time.sleep(pause)
            return run(state, n)

        trainer.run = slow
        theta = jax.eval_shape(lambda: trainer.optimizer.theta)
        return training.Work(trainer, theta, ("a", "b"), {"a": "0" * 64})

    return mock.patch.object(training, "assemble", assemble)


def config(iterations: int, **run: Any) -> dict[str, Any]:
    """The stand-in's config with the toy trainer's number of pairs."""
    content = fake_run.config(iterations, **({"devices": 0} | run))
    content["meta"]["estimator"]["pairs"] = 4
    return content


def environments(count: int) -> list[dict[str, str]]:
    """Returns the environment of each process of one run, as another launcher than Slurm would set it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    common = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
    common["PYTHONPATH"] = str(Path(celo_nnx.__file__).parents[1])
    places = [(address, str(count), str(place)) for place in range(count)]
    return [common | dict(zip(processes.VARIABLES, place, strict=True)) for place in places]


def start(command: list[Any], count: int = 1) -> list[subprocess.Popen]:
    """Starts a Python command as every process of a run."""
    words, pipe = [sys.executable, *map(str, command)], subprocess.PIPE
    return [
        subprocess.Popen(words, env=environment, stdout=pipe, stderr=pipe, text=True)
        for environment in environments(count)
    ]


def start_run(run_dir: Path, iterations: int, *changes: str, count: int = 1) -> list[subprocess.Popen]:
    """Starts this program."""
    return start([__file__, run_dir, iterations, *changes], count)


def ends(children: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Waits for processes; returns the exit code, output and errors of each."""
    try:
        told = [child.communicate(timeout=900) for child in children]
    finally:
        for child in children:
            child.kill()
    return [(child.returncode, *text) for child, text in zip(children, told, strict=True)]


def train(argv: list[str]) -> int:
    """Runs as ``celo-nnx train`` does, signals included."""
    run_dir, iterations, *changes = argv
    settings = {key: json.loads(value) for key, value in (change.split("=") for change in changes)}
    pause = settings.pop("pause", 0.0)
    with assembled(pause), mock.patch("celo_nnx.config.load", lambda *_: config(int(iterations), **settings)):
        return cli.main(["train", "toy", "--run-dir", run_dir])


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
