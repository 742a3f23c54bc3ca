"""results/: the committed tables and run folders agree; scripts/reproduce.py stops, goes on and publishes."""

import json
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import reproduce as reproduce_script
import results_tables as results
import torch
from results_rows import ROWS
from results_tables import INSPECTED, draw_results, records_markdown
from safetensors.torch import load_file

from fabricated_runs import fabricate
from indrnn.config.compose import load_config
from indrnn.errors import UserError
from indrnn.record.folder import run_folder
from indrnn.training.checkpoint import save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "results"
SMALL = {"steps": 600, "eval_every": 50, "log_every": 10, "half": 40.0}

needs_results = pytest.mark.skipif(not COMMITTED.is_dir(), reason="an sdist has no results/")


@needs_results
def test_the_committed_tables_are_those_of_the_committed_runs():
    readme = (COMMITTED / "README.md").read_text(encoding="utf-8")
    assert results.readme_with(readme, results.results_markdown(COMMITTED / "runs")) == readme


@needs_results
def test_the_committed_records_are_those_of_the_committed_runs():
    text = (COMMITTED / "speedrun.md").read_text(encoding="utf-8")
    assert results.readme_with(text, records_markdown(COMMITTED / "runs")) == text
    assert "No record yet" in records_markdown(COMMITTED / "runs", ())


@needs_results
def test_the_networks_looked_into_are_committed_and_stand_side_by_side():
    for run in INSPECTED:
        assert (COMMITTED / "runs" / run / "weights.safetensors").is_file()
    for stem in ("memory", "gradients", "digit"):
        text = (COMMITTED / "figures/inspect/mnist" / f"{stem}.svg").read_text(encoding="utf-8")
        assert "IndRNN" in text
        assert "LSTM (chrono)" in text


def test_every_committed_run_is_whole_and_consistent():
    folders = sorted({path.parent for path in (COMMITTED / "runs").glob("*/*/*/*")})
    assert [f"{folder}: {wrong}" for folder in folders for wrong in results.problems(folder)] == []
    # As `publish` writes them: no path of the machine that trained the run.
    places = re.compile(r"(?m)^(?:\s*root|output_root): (?!data$|outputs$).*$")
    assert [folder for folder in folders if places.search((folder / "config.yaml").read_text(encoding="utf-8"))] == []
    strangers = [
        path for folder in folders for path in folder.iterdir() if path.name not in results.FILES + results.KEPT_TOO
    ]
    assert strangers == []
    depths = {len(path.relative_to(COMMITTED / "runs").parts) for path in (COMMITTED / "runs").rglob("result.json")}
    assert depths <= {4}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.task}/{row.name}")
def test_a_rows_command_makes_the_folder_that_the_table_looks_in(row):
    cfg = load_config([*row.overrides, "seed=2", "output_root=work"])
    assert run_folder(cfg) == Path("work", row.task, row.name, "seed2")


def test_rows_are_named_once():
    assert len({(row.task, row.name) for row in ROWS}) == len(ROWS)
    assert all(row.protocol in results.PROTOCOLS for row in ROWS)


@pytest.fixture
def committed(tmp_path):
    """A results folder with two published runs and one that is no row of the table."""
    runs = tmp_path / "results" / "runs"
    for seed in range(2):
        results.publish(fabricate(tmp_path / "work", "indrnn", seed, best=0.995, **SMALL), runs)
    results.publish(fabricate(tmp_path / "work", "indrnn", tag="cpu", **SMALL), runs)
    for seed in range(2):
        first = {"steps": 1700, "eval_every": 1700, "log_every": 100, "tag": "first1700"}
        results.publish(fabricate(tmp_path / "work", "paper_6layer", seed, **first), runs)
    for name in ("README.md", "speedrun.md"):
        (tmp_path / "results" / name).write_text(f"before\n{results.BEGIN}\nold\n{results.END}\nafter\n")
    results.update_readme(tmp_path / "results")
    return tmp_path / "results"


def _line(text: str, *words: str) -> str:
    return next(line for line in text.splitlines() if all(word in line for word in words))


def test_the_generated_table_shows_runs_beside_what_others_published(committed):
    text = (committed / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"before\n{results.BEGIN}\n")
    assert text.endswith(f"{results.END}\nafter\n")
    line = _line(text, "tutorial", "6 × 128")
    assert "98.9 after 60,000 updates" in line
    assert re.search(r"\| +2 \| +9\d\.\d\d ± 0\.\d\d \|", line)
    assert "not run yet" in _line(text, "paper_indrnn ", "99.04 [log]")
    assert "indrnn-cpu" in text.split("Other runs")[1]


def test_runs_that_end_after_1700_updates_stand_beside_the_logs_and_nowhere_else(committed):
    text = (committed / "README.md").read_text(encoding="utf-8")
    assert re.search(r"paper_6layer-first1700 +\| +2 +\| +\d\d\.\d\d ± \d\.\d\d +\| +77\.7 +\|", text)
    assert text.count("first1700") == 1
    drawn = [path.read_text(encoding="utf-8") for path in draw_results(committed) if path.suffix == ".svg"]
    assert len(drawn) == 3
    assert all("indrnn" in svg and "first1700" not in svg for svg in drawn)


def test_regenerating_changes_nothing_and_a_changed_run_does(committed):
    before = (committed / "README.md").read_text(encoding="utf-8")
    results.update_readme(committed)
    assert (committed / "README.md").read_text(encoding="utf-8") == before
    shutil.rmtree(committed / "runs/mnist/indrnn/seed1")
    assert results.readme_with(before, results.results_markdown(committed / "runs")) != before


def test_a_readme_without_markers_is_refused(tmp_path):
    with pytest.raises(UserError, match="lacks the lines"):
        results.readme_with("nothing here", "table")


def test_only_figures_and_weights_are_published(committed):
    kept = sorted([*results.FILES, "weights.safetensors"])
    assert sorted(path.name for path in (committed / "runs/mnist/indrnn/seed0").iterdir()) == kept


def test_a_run_made_before_weights_were_kept_is_published_with_those_of_its_checkpoint(tmp_path):
    folder = fabricate(tmp_path / "work", **SMALL)
    (folder / "weights.safetensors").unlink()
    with pytest.raises(UserError, match=r"weights\.safetensors is missing"):
        results.publish(folder, tmp_path / "runs")
    save_checkpoint(folder / "best.pt", {"model": {"weight": torch.ones(2)}})
    published = results.publish(folder, tmp_path / "runs")
    assert torch.equal(load_file(published / "weights.safetensors")["weight"], torch.ones(2))


# Records


def _timed(root: Path, seeds: int, **kind) -> Path:
    for seed in range(seeds):
        folder = fabricate(root / "work", "fast_indrnn", seed, tag="speedrun", **(SMALL | kind))
        timing = {"begun": f"2026-12-0{seed + 1}T10:00:00+00:00", "threads": 2, "seconds": 600.0 + 60 * seed}
        (folder / "timing.json").write_text(json.dumps(timing | {"load_before": 0.0, "load_after": 2.0}))
        results.publish(folder, root / "runs")
    return root / "runs"


RECORD = ("fast_indrnn-speedrun",)


def test_a_record_is_a_line_made_from_its_runs(tmp_path):
    text = records_markdown(_timed(tmp_path, 3, best=0.999, half=2.0), RECORD)
    (line,) = text.splitlines()[2:]
    assert line.startswith("| 99.0 validation, 98.9 test")
    for cell in ("11.0 ± 1.0", "NVIDIA H200", "torch 2.15.0, indrnn 0000000", "2026-12-03", "| float32"):
        assert cell in line
    assert "(runs/mnist/fast_indrnn-speedrun)" in line


@pytest.mark.parametrize(
    ("seeds", "best", "said"), [(2, 0.999, "has 2 finished runs; at least 3"), (3, 0.9, "mean above no mark")]
)
def test_what_breaks_a_rule_is_no_record(seeds, best, said, tmp_path):
    runs = _timed(tmp_path, seeds, best=best, half=2.0)
    with pytest.raises(UserError, match=said):
        records_markdown(runs, RECORD)
    (runs / "mnist/fast_indrnn-speedrun/seed1/timing.json").unlink()
    with pytest.raises(UserError, match=r"has 2 finished|has no timing .*timing\.json"):
        records_markdown(runs, RECORD)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("val_accuracy", 0.9999, "val_accuracy is 0.9999"),
        ("steps", 601, "steps is 601"),
        ("seed", 7, "seed is 7"),
        ("best_step", 51, "best_step 51"),
        ("test_accuracy", 0.5, "test_accuracy is 0.5"),
        ("test_ci95", [0.1, 0.2], "test_ci95"),
        ("model", "lstm", "model is lstm"),
    ],
)
def test_an_altered_result_is_noticed_and_not_published(key, value, said, tmp_path):
    folder = fabricate(tmp_path / "work", **SMALL)
    assert results.problems(folder) == []
    result = json.loads((folder / "result.json").read_text())
    (folder / "result.json").write_text(json.dumps(result | {key: value}))
    assert said in "; ".join(results.problems(folder))
    with pytest.raises(UserError, match="cannot be published"):
        results.publish(folder, tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_missing_file_and_a_moved_folder_are_noticed(tmp_path):
    folder = fabricate(tmp_path / "work", **SMALL)
    moved = folder.rename(folder.with_name("seed5"))
    assert "the folder is mnist/indrnn/seed5 but should be mnist/indrnn/seed0" in results.problems(moved)
    (moved / "metrics.csv").unlink()
    assert results.problems(moved) == ["metrics.csv is missing"]


# A stand-in for indrnn-train: counts to five in checkpoint.pt, or to one and on no further; 143 on SIGTERM.
TRAIN = """#!{python}
import json, pathlib, shutil, signal, sys
given = dict(word.split("=", 1) for word in sys.argv[1:])
if given["model"] == "lstm":
    sys.exit("it went wrong")
folder = pathlib.Path(given["output_root"], given["data"], given["model"], "seed" + given["seed"])
folder.mkdir(parents=True, exist_ok=True)
def stop(*_):
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
checkpoint = folder / "checkpoint.pt"
done = int(checkpoint.read_text()) if checkpoint.exists() else 0
while done < 5:
    done += 1
    checkpoint.write_text(str(done))
    while {stay}:
        signal.pause()
shutil.copytree({made!r} + "/mnist/indrnn/seed" + given["seed"], folder, dirs_exist_ok=True)
"""


@pytest.fixture
def reproduce(tmp_path, monkeypatch, capsys):
    """scripts/reproduce.py with the stand-in: reproduce(*arguments) -> (code, printed).

    Time stands still in it; with ``stay`` no run ends by itself and the time is up when the first has a checkpoint.
    """
    for seed in range(3):
        fabricate(tmp_path / "made", seed=seed, **SMALL)
    (tmp_path / "results").mkdir()
    for name in ("README.md", "speedrun.md"):
        (tmp_path / "results" / name).write_text(f"{results.BEGIN}\n{results.END}\n")
    program = tmp_path / "indrnn-train"
    monkeypatch.setattr(reproduce_script, "_program", lambda: str(program))
    monkeypatch.setattr(reproduce_script, "LEAST", 0.0)
    monkeypatch.setattr(reproduce_script, "POLL", 0.05)
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments, stay=False):
        checkpoint = tmp_path / "work/mnist/indrnn/seed0/checkpoint.pt"

        def now():
            return 1e6 if stay and checkpoint.exists() and checkpoint.read_text() else 0.0

        monkeypatch.setattr(reproduce_script, "time", SimpleNamespace(monotonic=now, sleep=time.sleep))
        program.write_text(TRAIN.format(python=sys.executable, stay=stay, made=str(tmp_path / "made")))
        program.chmod(program.stat().st_mode | stat.S_IEXEC)
        places = ["--work", str(tmp_path / "work"), "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", ["reproduce.py", *places, *arguments])
        monkeypatch.setattr(reproduce_script, "_regenerate", lambda folder: results.update_readme(folder))
        code = reproduce_script.main()
        return code, capsys.readouterr().out

    yield call
    signal.signal(signal.SIGTERM, before)


ONLY = ("--only", "mnist/indrnn")


def test_reproduce_stops_at_the_budgets_end_and_a_later_call_goes_on(reproduce, tmp_path):
    code, printed = reproduce(*ONLY, "--minutes", "1", stay=True)
    assert (code, "0 of 3 runs done" in printed) == (0, True)
    assert (tmp_path / "work/mnist/indrnn/seed0/checkpoint.pt").read_text() == "1"
    assert "part-done" in reproduce(*ONLY, "--list")[1]

    code, printed = reproduce(*ONLY, "--minutes", "1", "--parallel", "3")
    assert (code, "3 of 3 runs done" in printed) == (0, True)
    assert "part-done" in printed
    table = (tmp_path / "results" / "README.md").read_text(encoding="utf-8")
    assert re.search(r"indrnn +\| +3 \|", table)

    code, printed = reproduce(*ONLY, "--minutes", "1")
    assert (code, printed.splitlines()) == (0, ["3 of 3 runs done"])


def test_reproduce_publishes_what_a_killed_call_left_finished(reproduce, tmp_path):
    shutil.copytree(tmp_path / "made", tmp_path / "work")
    _, printed = reproduce(*ONLY, "--minutes", "1")
    assert "3 of 3 runs done" in printed
    assert not (tmp_path / "work/logs").exists(), "nothing is trained again"


def test_reproduce_goes_on_after_a_failed_run_and_ends_with_1(reproduce):
    code, printed = reproduce("--only", "mnist/lstm", *ONLY, "--minutes", "1")
    assert code == 1
    assert printed.count("failed, code 1: it went wrong") == 3
    assert "3 of 6 runs done" in printed


@pytest.mark.parametrize("arguments", ["", "--minutes 1 --parallel 0", "--only mnist/nothing --list"])
def test_reproduce_refuses_what_makes_no_sense(reproduce, arguments):
    with pytest.raises(UserError):
        reproduce(*arguments.split())


def test_reproduce_runs_as_a_script():
    command = [sys.executable, str(ROOT / "scripts" / "reproduce.py"), "--list"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(printed) == sum(len(row.seeds) for row in ROWS)
    assert printed[0].startswith("mnist/fast_indrnn/seed0")
