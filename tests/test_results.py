"""results/: the committed tables and run folders agree. scripts/reproduce.py stops, resumes and publishes."""

import json
import re
import signal
import sys
from pathlib import Path

import pytest
import reproduce as results
from results_rows import ROWS

from fabricated_runs import fabricate
from indrnn.config.compose import load_config
from indrnn.errors import UserError
from indrnn.record.folder import run_folder

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "results"

needs_results = pytest.mark.skipif(not COMMITTED.is_dir(), reason="an sdist has no results/")


@needs_results
def test_committed_tables_are_generated_from_the_committed_runs():
    text = (COMMITTED / "README.md").read_text(encoding="utf-8")
    assert results.results_markdown(COMMITTED / "runs") in text


@needs_results
def test_every_committed_run_is_complete_and_consistent():
    folders = sorted({path.parent for path in (COMMITTED / "runs").glob("*/*/*/*")})
    assert [f"{folder}: {wrong}" for folder in folders for wrong in results.problems(folder)] == []
    # `publish` removes the paths of the machine that trained the run.
    places = re.compile(r"(?m)^(?:\s*root|output_root): (?!data$|outputs$).*$")
    assert [folder for folder in folders if places.search((folder / "config.yaml").read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.task}/{row.name}")
def test_command_of_a_row_writes_the_folder_of_the_table(row):
    cfg = load_config([*row.overrides, "seed=2", "output_root=work"])
    assert run_folder(cfg) == Path("work", row.task, row.name, "seed2")


@pytest.fixture
def committed(tmp_path):
    """A results folder with two published runs of a row and one that is not a row of the table."""
    runs = tmp_path / "results" / "runs"
    for seed in range(2):
        results.publish(fabricate(tmp_path / "work", "indrnn", seed, best=0.995), runs)
    results.publish(fabricate(tmp_path / "work", "indrnn", tag="cpu"), runs)
    (tmp_path / "results/README.md").write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    results.update_readme(tmp_path / "results")
    return tmp_path / "results"


def test_generated_table_has_rows_other_runs_and_published_numbers(committed):
    text = (committed / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n{results.BEGIN}\n")
    assert text.endswith(f"{results.END}\nafter\n")
    line = next(line for line in text.splitlines() if "| tutorial" in line and "6 × 128" in line)
    assert "98.9 after 60,000 updates" in line
    assert re.search(r"\| +2 \| +9\d\.\d\d ± 0\.\d\d \|", line)
    assert "not run yet" in next(line for line in text.splitlines() if "paper_indrnn " in line)
    assert "indrnn-cpu" in text.split("Other runs")[1]


def test_figures_leave_out_ablations_and_other_runs(committed):
    results.publish(fabricate(committed.parent / "work", "fast_indrnn", tag="no-norm"), committed / "runs")
    drawn = [path.read_text(encoding="utf-8") for path in results.draw_results(committed) if path.suffix == ".svg"]
    assert len(drawn) == 3
    assert not any(name in text for text in drawn for name in ("fast_indrnn", "indrnn-cpu"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("val_accuracy", 0.9999), ("steps", 601), ("seed", 7), ("best_step", 51), ("test_accuracy", 0.5),
        ("test_loss", 9.0), ("model", "lstm"), ("name", "other"),
    ],
)  # fmt: skip
def test_altered_result_is_not_published(key, value, tmp_path):
    folder = fabricate(tmp_path / "work")
    assert results.problems(folder) == []
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {key: value}))
    with pytest.raises(UserError, match="cannot be published"):
        results.publish(folder, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_moved_folder_and_missing_file_are_not_published(tmp_path):
    folder = fabricate(tmp_path / "work")
    moved = folder.rename(folder.with_name("seed5"))
    assert any("seed5" in fault for fault in results.problems(moved))
    (moved / "metrics.csv").unlink()
    assert results.problems(moved) == ["metrics.csv is missing"]


# Stands in for indrnn-train: writes a checkpoint, waits if `stay` exists, then finishes. Exits with 143 on SIGTERM.
TRAIN = """
import pathlib, shutil, signal, sys, time
given = dict(word.split("=", 1) for word in sys.argv[1:])
if given["model"] == "lstm":
    sys.exit("it went wrong")
folder = pathlib.Path(given["output_root"], given["data"], given["model"], "seed" + given["seed"])
folder.mkdir(parents=True, exist_ok=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
(folder / "checkpoint.pt").write_text("")
while pathlib.Path({root!r}, "stay").exists():
    time.sleep(0.05)
shutil.copytree({root!r} + "/made/mnist/indrnn/seed" + given["seed"], folder, dirs_exist_ok=True)
"""


@pytest.fixture
def reproduce(tmp_path, monkeypatch, capsys):
    """scripts/reproduce.py with a stand-in for training: reproduce(*arguments) -> (exit code, printed text)."""
    for seed in range(3):
        fabricate(tmp_path / "made", seed=seed)
    (tmp_path / "results").mkdir()
    (tmp_path / "results/README.md").write_text(f"{results.BEGIN}\n{results.END}\n")
    program = tmp_path / "indrnn-train"
    program.write_text(TRAIN.format(root=str(tmp_path)))
    monkeypatch.setattr(results, "TRAIN", [sys.executable, str(program)])
    monkeypatch.setattr(results, "draw_results", lambda _: None)

    def call(*arguments):
        places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *places, *arguments])
        code = results.main()
        return code, capsys.readouterr().out

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


ONLY = ("--only", "mnist/indrnn")


def test_reproduce_stops_at_the_time_limit_and_resumes(reproduce, tmp_path):
    (tmp_path / "stay").touch()
    code, printed = reproduce(*ONLY, "--minutes", "0.05")
    assert (code, "0 of 3 runs finished" in printed) == (0, True)
    (tmp_path / "stay").unlink()
    code, printed = reproduce(*ONLY, "--minutes", "5")
    assert (code, "3 of 3 runs finished" in printed) == (0, True)
    table = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"indrnn +\| +3 \|", table)
    assert reproduce(*ONLY, "--minutes", "5") == (0, "3 of 3 runs finished\n")


def test_reproduce_continues_after_a_failed_run_and_exits_with_1(reproduce):
    code, printed = reproduce("--only", "mnist/lstm", *ONLY, "--minutes", "5")
    assert code == 1
    assert "3 of 6 runs finished" in printed


@pytest.mark.parametrize("arguments", ["", "--minutes 1 --list", "--only mnist/nothing --list"])
def test_reproduce_refuses_wrong_arguments(reproduce, arguments):
    with pytest.raises((UserError, SystemExit)):
        reproduce(*arguments.split())


def test_reproduce_lists_every_run(reproduce):
    _, printed = reproduce("--list")
    assert printed.startswith("mnist/fast_indrnn/seed0  missing\n")
    assert printed.count("\n") == sum(row.num_seeds for row in ROWS)
