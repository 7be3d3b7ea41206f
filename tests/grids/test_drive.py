"""A grid's folder: what runs, what is kept, what is refused; and the commands."""

import json
import re
from pathlib import Path
from unittest import mock

import fake_run
import made_grid
import pytest

from celo_nnx import lock
from celo_nnx.cli import main
from celo_nnx.errors import UserError
from celo_nnx.grids import local, probe, report, work
from celo_nnx.grids.drive import run
from celo_nnx.grids.grid_file import load_grid
from celo_nnx.grids.plan import plan
from celo_nnx.grids.status import status_lines
from celo_nnx.grids.store import CellFolder, read_grid

SELDOM = ("run.checkpoint_seconds=1000.0",)


def results(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When each result was written, and what it says."""
    paths = folder.glob("cells/*/result.json")
    return {p.parent.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in paths}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def grid(files):
    return load_grid(made_grid.file(files), SELDOM)


@pytest.fixture(scope="module")
def done(files, tmp_path_factory) -> Path:
    """A grid of which one cell failed, and then did not."""
    folder = tmp_path_factory.mktemp("grids") / "done"
    grid, train = load_grid(made_grid.file(files), SELDOM), work.training.train
    failed = []

    def once(config, run_dir, **options):
        if not failed:
            failed.append(Path(run_dir).parent)
            raise RuntimeError("no\nluck")
        return train(config, run_dir, **options)

    with mock.patch.object(work.training, "train", once):
        outcome = run(grid, folder, made_grid.inline)
    assert (outcome.cells, outcome.done, outcome.computed, outcome.failed) == (12, 11, 11, 1)
    assert CellFolder(failed[0]).failure() == "RuntimeError: no luck"
    (line,) = [x for x in status_lines(read_grid(folder)) if " failed " in x and "1 failed" not in x]
    assert "rate=1e-3 std=small seed=0" in line and "0/12" in line and "RuntimeError: no luck" in line
    before = results(folder)
    outcome = run(grid, folder, made_grid.inline)
    assert (outcome.done, outcome.computed, outcome.failed) == (12, 1, 0)
    after = results(folder)
    assert {key: after[key] for key in before} == before
    return folder


def test_a_finished_grid_is_left_alone(grid, done):
    before = results(done)
    with mock.patch.object(work.training, "train", side_effect=AssertionError):
        assert run(grid, done, made_grid.inline).computed == 0
    assert results(done) == before
    assert status_lines(read_grid(done))[-1] == "12 cells: 12 done"


def test_a_result_says_what_training_gave(done):
    entry = read_grid(done).cells[0]
    result = entry.folder.result()
    rows = [json.loads(x) for x in (entry.folder.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows]
    assert len(losses) == 12 and result["outcome"]["iterations"] == 12
    assert result["outcome"]["meta_loss"] == pytest.approx(sum(losses[-2:]) / 2)
    assert result["outcome"]["nonfinite"] == 24 and result["cost"]["starts"] == 2
    assert (
        len({cell.folder.result()["outcome"]["theta"] for cell in read_grid(done).cells}) == 6
    )  # not by std


def test_a_changed_cell_is_named_and_accepted_on_demand(grid, files, tmp_path):
    folder, few = tmp_path / "g", ("run.iterations=4", *SELDOM)
    small = load_grid(made_grid.file(files), few)
    run(small, folder, made_grid.inline)
    before = results(folder)
    assert len(before) == 12
    changed = load_grid(made_grid.file(files, rate='("meta.optimizer.learning_rate=5e-3",)'), few)
    with pytest.raises(UserError) as caught:
        run(changed, folder, made_grid.inline)
    text = str(caught.value)
    assert "6 cells" in text and "meta.optimizer.learning_rate = 0.005 here, 0.003 there" in text
    assert "--accept-changed" in text and results(folder) == before
    with pytest.raises(UserError, match=r"12 cells .* run.iterations = 12 here, 4 there"):
        run(load_grid(made_grid.file(files), SELDOM), folder, made_grid.inline)
    outcome = run(changed, folder, made_grid.inline, accept_changed=True)
    assert (outcome.done, outcome.computed) == (12, 6)
    after = results(folder)
    assert len(after) == 18 and {key: after[key] for key in before} == before
    # Another label is no change: its cells come, the others stay.
    more = made_grid.FILE.replace(
        '"3e-3": RATE', '"3e-3": RATE, "1e-2": ("meta.optimizer.learning_rate=1e-2",)'
    )
    path = made_grid.file(files, more, rate='("meta.optimizer.learning_rate=5e-3",)')
    assert run(load_grid(path, few), folder, made_grid.inline).computed == 6


def test_another_name_of_a_label_or_one_more_axis_runs_nothing_again(grid, files, done):
    before = results(done)
    named = made_grid.FILE.replace('"3e-3": RATE', '"fast": RATE')
    wider = named.replace("axes=(", 'axes=(("all", {"same": ()}),')
    swapped = made_grid.FILE.replace('"1e-3": (', '"3e-3": (').replace('"3e-3": RATE', '"1e-3": RATE')
    for text, place in ((named, "rate=fast"), (wider, "all=same rate=fast"), (swapped, "rate=1e-3")):
        assert run(load_grid(made_grid.file(files, text), SELDOM), done, made_grid.inline).computed == 0
        lines = "\n".join(status_lines(read_grid(done)))
        assert results(done) == before and f"{place} std=small seed=0" in lines and "12 done" in lines
        assert work.run_cell(read_grid(done).cells[0].folder.path) == "done"
    run(grid, done, made_grid.inline)


def test_stop_ends_the_call(grid, tmp_path):
    asked = []

    def engine(folders, stop, tell):
        made_grid.inline(folders[:2], stop, tell)
        asked.append(15)
        made_grid.inline(folders[2:], stop, tell)

    outcome = run(grid, tmp_path / "g", engine, stop=lambda: asked[0] if asked else 0)
    assert (outcome.done, outcome.stopped_by) == (2, 15)


def test_folders_of_something_else_are_refused(grid, tmp_path, files):
    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").write_text("x")
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "grid.json").write_text('{"kind": "pylons"}')
    for name, words in (("file", "is a file"), ("other", "holds 'notes'"), ("json", "grid.json")):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words):
            run(grid, tmp_path / name, made_grid.inline)
        with pytest.raises(UserError):
            read_grid(tmp_path / name)
        assert sorted(tmp_path.rglob("*")) == before
    nothing = lambda folders, stop, tell: None  # noqa: E731
    run(grid, tmp_path / "g", nothing)
    other = load_grid(made_grid.file(files, name="other.py"), SELDOM)
    with pytest.raises(UserError, match="is of the grid 'small', not 'other'"):
        run(other, tmp_path / "g", nothing)
    with lock.hold(tmp_path / "g"), pytest.raises(UserError, match="in use by pid"):
        run(grid, tmp_path / "g", nothing)


def test_damaged_files_are_told(grid, tmp_path):
    folder = tmp_path / "g"
    run(grid, folder, lambda folders, stop, tell: None)
    cell = read_grid(folder).cells[0].folder
    content = json.loads((cell.path / "cell.json").read_text())
    content["config"]["meta"]["estimator"]["std"] = 5.0
    (cell.path / "cell.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="was changed: its id is"):
        work.run_cell(cell.path)
    del content["config"]
    (cell.path / "cell.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged"):
        work.run_cell(cell.path)
    content = json.loads((folder / "grid.json").read_text())
    content["cells"][0]["id"] = "../../etc"
    (folder / "grid.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="is damaged"):
        read_grid(folder)


@pytest.mark.parametrize("text", ["", '{"outcome": {"meta_lo', "{}"])
def test_a_damaged_result_stops_no_other_cell(grid, tmp_path, capsys, text):
    folder = tmp_path / "g"
    run(grid, folder, lambda folders, stop, tell: made_grid.inline(folders[:1], stop, tell))
    path = read_grid(folder).cells[0].folder.path / "result.json"
    whole = path.read_text()
    path.write_text(text)
    again = f"{path} is not .*; delete it, and grid run runs the cell again"
    with pytest.raises(UserError, match=again):
        work.run_cell(path.parent)
    capsys.readouterr()
    outcome = run(grid, folder, lambda folders, stop, tell: None)
    assert (outcome.done, outcome.failed, outcome.damaged) == (0, 0, 1) and path.read_text() == text
    assert re.search(f"rate=1e-3 std=small seed=0: damaged  {again}", capsys.readouterr().err)
    lines = status_lines(read_grid(folder))
    assert re.search(f" damaged .*{again}", lines[1]) and lines[-1] == "12 cells: 1 damaged, 11 waiting"
    assert "0 of 12 cells are done, 1 damaged." in report.write(folder).read_text()
    path.unlink()
    assert run(grid, folder, lambda folders, stop, tell: made_grid.inline(folders[:1], stop, tell)).done == 1
    assert json.loads(path.read_text())["outcome"] == json.loads(whole)["outcome"]


def test_a_probe_times_one_cell_of_each_program(grid):
    """Rates are real numbers, which compile to as much work; the number of pairs is none."""
    cells, timed = plan(grid), []

    def times(cell):
        timed.append(cell.name)
        return 1.0, 0.1 * cell.config["meta"]["estimator"]["pairs"]

    with mock.patch.object(probe, "_timed", times):
        found = probe.probe(cells)
    assert timed == ["rate=1e-3 std=small seed=0", "rate=1e-3 std=large seed=0"]
    assert found.each == pytest.approx((0.8, 0.4)) and found.total == pytest.approx(12 + 6 * 12 * (0.8 + 0.4))
    text = probe.told(found, 12, "smoke")
    assert "0.4 to 0.8 s a meta-iteration" in text and "evaluation on smoke is not included" in text


def test_commands(files, tmp_path, capsys, monkeypatch):
    path, folder = made_grid.file(files), str(tmp_path / "g")
    assert main(["grid", "plan", path, "run.iterations=4"]) == 0
    out = capsys.readouterr().out
    assert "12 cells, 48 meta-iterations" in out and out.splitlines()[-1].startswith("--probe says about how")
    with fake_run.assembled(pause=0.02):
        assert main(["grid", "plan", path, "--probe"]) == 0
    assert re.search(r"about .* for 12 cells .* 0\.\d+ s a meta-iteration", capsys.readouterr().out)
    monkeypatch.setattr(local.Local, "__call__", lambda self, *args: made_grid.inline(*args))
    words = ["grid", "run", path, "--run-dir", folder, "--jobs", "2", "run.iterations=4", *SELDOM]
    with mock.patch.object(work.training, "train", side_effect=RuntimeError("no")):
        assert main(words) == 1
    out = capsys.readouterr()
    assert json.loads(out.out)["failed"] == 12 and "failed  RuntimeError: no (log:" in out.err
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["done"] == 12
    assert main(["grid", "status", folder]) == 0 and "12 done" in capsys.readouterr().out
    assert main(["grid", "report", folder]) == 0 and "report.html" in capsys.readouterr().out
    cell = read_grid(folder).cells[0].folder.path
    assert main(["grid", "cell", str(cell)]) == 0
    assert json.loads(capsys.readouterr().out) == {"cell": str(cell), "state": "done"}
    mistakes = [
        ["status", str(tmp_path)],
        ["report", "none"],
        ["cell", folder],
        ["plan", "non"],
        ["plan", "no.py"],
    ]
    mistakes += [["run", path, "--run-dir", folder, "--jobs", "0"], ["run", path], ["fly"]]
    for mistake in mistakes:
        assert main(["grid", *mistake]) == 2
        out = capsys.readouterr()
        assert out.err.startswith("celo-nnx: error: ") and len(out.err.splitlines()) == 1
    assert main(["list", "grids"]) == 0
    assert "output_normalization" in capsys.readouterr().out
