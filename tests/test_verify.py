"""``verify``: a recipe run again, compared with its record."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from celo_nnx import cli, weights
from celo_nnx.config import load
from celo_nnx.run_files import resolve
from celo_nnx.run_folder import RunFolder
from celo_nnx.theta_io import read_metadata
from celo_nnx.training import train

SMALL = [
    "optimizer.features.groups=gradient,momentum",
    "optimizer.update_rule.hidden=(2,)",
    "meta.estimator.pairs=2",
    "meta.estimator.truncation=2",
    "run.iterations_per_dispatch=3",
    "run.progress=False",
    "run.devices=1",
]


def test_a_recipe_gives_its_record_again_and_what_differs_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load("celo2_base:fast_digits", [*SMALL, "run.iterations=3"])
    result = train(config, tmp_path / "run")
    run, folder = RunFolder(tmp_path / "run"), tmp_path / "weights"
    folder.mkdir()
    (tmp_path / "run" / "theta.safetensors").rename(folder / "mine.safetensors")
    losses = run.metrics["loss"].tolist()
    made = {"first_losses": losses, "data": run.info["data"], "starts": run.info["starts"]}
    card = {"format": weights.FORMAT, "name": "mine", "config": resolve(config), "made": made}
    card["digest"] = read_metadata(folder / "mine.safetensors")["digest"]
    monkeypatch.setattr(weights, "FOLDER", folder)

    def verify(**changes: object) -> tuple[int, str]:
        content = card | {"made": made | changes}
        (folder / "mine.json").write_text(json.dumps(content))
        code = cli.main(["verify", "mine"])
        out = capsys.readouterr()
        return code, out.out + out.err

    code, text = verify()
    row = json.loads(text)
    assert code == 0 and row["ok"] and row["digest"] and row["largest_difference"] == 0.0 and result.finished
    code, text = verify(first_losses=[losses[0], losses[1] + 0.5, losses[2]])
    assert code == 1 and 0.03 < json.loads(text)["largest_difference"] <= 0.5
    code, text = verify(data={name: "0" * 64 for name in run.info["data"]})
    assert code == 2 and "are not those that the weights were made with" in text and text.count("\n") == 1
    card["digest"] = "0" * 64
    code, text = verify()
    assert code == 1 and not json.loads(text)["digest"]
