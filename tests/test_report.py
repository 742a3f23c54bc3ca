"""indrnn-report: the tables and figures that a user finds, and the messages for wrong input."""

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from fabricated_runs import ADDING, MNIST, fabricate
from indrnn.cli.report import main
from indrnn.errors import UserError
from indrnn.report.page import write_report
from indrnn.report.runs import by_task, collect, labels
from indrnn.report.style import looks
from indrnn.report.table import duration, extent, markdown_report, percent, task_table


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "outputs"
    for seed in range(3):
        fabricate(root, "indrnn", seed, best=0.99)
        fabricate(root, "lstm", seed, best=0.9)
    return root


def rows_of(root):
    return task_table(collect([root])).set_index("name").to_dict("index")


def test_models_keep_their_color_and_runs_of_one_model_differ_in_line_style():
    for names in (["fast_6layer", "indrnn"], ["indrnn-cpu", "zebra"], ["demo_indrnn", "indrnn", "paper_6layer"]):
        look = looks({**dict.fromkeys(names, "indrnn"), "lstm-cpu": "lstm"})
        assert {look[name]["color"] for name in names} == {looks({"any": "indrnn"})["any"]["color"]}
        assert len({str(look[name]["linestyle"]) for name in names}) == len(names)
        assert look["lstm-cpu"] == looks({"lstm": "lstm"})["lstm"]
    custom = looks({name: name for name in ("a", "b", "indrnn", "lstm", "rnn")})
    assert len({one["color"] for one in custom.values()}) == 5


def test_report_writes_every_file_into_the_given_folder(runs, capsys):
    main([str(runs)])
    printed = capsys.readouterr().out.splitlines()
    made = {path.relative_to(runs / "report").as_posix() for path in (runs / "report").rglob("*.*")}
    figures = {f"mnist/{stem}.{kind}" for stem in ("accuracy", "error", "loss") for kind in ("png", "svg")}
    assert made == {"report.html", "summary.csv", "table.md"} | figures
    assert printed[-1].endswith(f"tensorboard --logdir {runs}")
    table = (runs / "report" / "table.md").read_text(encoding="utf-8").splitlines()
    assert table == printed[: len(table)]


def test_table_has_mean_and_sample_deviation_best_first(runs):
    groups = collect([runs])
    table = task_table(groups)
    assert [*zip(table["name"], table["n"], strict=True)] == [("indrnn", "3"), ("lstm", "3")]
    accuracies = [100 * result.test_accuracy for result in groups[0].results]
    assert table["test %"][0] == f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
    text = markdown_report(groups)
    header = next(line for line in text.splitlines() if line.startswith("| network"))
    assert "test %" in header
    assert "precision" not in header
    assert text.count("NVIDIA H200") == 1  # what is equal in all rows is stated once


def test_summary_has_one_row_per_run(runs, tmp_path):
    fabricate(runs, "gru", finished=False)
    write_report([runs], tmp_path / "report")
    table = pd.read_csv(tmp_path / "report" / "summary.csv").set_index(["name", "seed"])
    assert len(table) == 7
    for run in (run for group in collect([runs]) for run in group.finished):
        row = table.loc[(run.name, run.seed)]
        assert (row["state"], row["test_accuracy"]) == ("finished", run.result.test_accuracy)
        assert (row["test_ci95_low"], row["path"]) == (run.result.test_ci95[0], run.path.as_posix())
    assert table.loc[("gru", 0), "state"] == "unfinished"


def test_single_run_has_a_mark_and_an_interval_instead_of_a_deviation(tmp_path):
    fabricate(tmp_path)
    fabricate(tmp_path, "lstm", best=0.1)
    row, chance = rows_of(tmp_path).values()
    low, high = map(float, row["95 % CI"].split("–"))
    assert low < float(row["test %"].removesuffix(" †")) < high
    assert chance["test %"].endswith("‡")


def test_unfinished_runs_are_listed_but_not_averaged(runs, tmp_path):
    before = rows_of(runs)["lstm"]
    fabricate(runs, "lstm", 3, best=0.2, finished=False)
    rows = rows_of(runs)
    assert rows["lstm"] == before
    assert rows["lstm seed 3, unfinished"]["updates"] == "200"
    assert rows["lstm seed 3, unfinished"]["test %"] == ""
    # Alone, and without an evaluation.
    fabricate(tmp_path / "alone", finished=False, steps=120)
    tables, paths = write_report([tmp_path / "alone"], tmp_path / "report")
    assert "indrnn seed 0, unfinished" in tables
    assert all(path.stat().st_size for path in paths)


def test_groups_of_different_settings_are_pointed_out(runs):
    assert "different settings" not in markdown_report(collect([runs]))
    fabricate(runs, "lstm", 3, best=0.9, steps=700)
    assert "lstm have different settings: trainer.max_steps" in markdown_report(collect([runs]))


def test_mnist5k_is_never_called_mnist_accuracy(tmp_path):
    subset = {"name": "mnist5k", "validation_size": 500, "test_size": 1000, "split_seed": 0, "permutation": None}
    fabricate(tmp_path / "runs", data=subset)
    tables, _ = write_report([tmp_path / "runs"], tmp_path / "report")
    assert "not MNIST accuracy" in tables
    assert "5,000-image subset" in tables


def test_permutations_and_tags_are_separate_groups(tmp_path):
    for permutation in ("seed92916", "bitrev"):
        fabricate(tmp_path, data={**MNIST, "name": "mnist_permuted", "permutation": permutation})
    fabricate(tmp_path, tag="wide")
    fabricate(tmp_path)
    groups = collect([tmp_path])
    assert list(by_task(groups)) == ["mnist", "mnist_permuted", "mnist_permuted-bitrev"]
    assert [group.name for group in groups if group.task.folder == "mnist"] == ["indrnn", "indrnn-wide"]


def test_length_study_is_drawn_for_several_lengths_with_its_baseline(tmp_path):
    for length in (20, 1000):
        for name, best in (("indrnn", 0.001), ("lstm", 0.1)):
            fabricate(tmp_path / "runs", name, best=best, data={**ADDING, "length": length})
    tables, paths = write_report([tmp_path / "runs"], tmp_path / "report")
    headings = [line for line in tables.splitlines() if line.startswith("##")]
    assert headings == [f"## Adding problem, T = {length}" for length in ("20", "1,000")]
    assert tmp_path / "report/length_study.png" in paths
    assert "predict-the-mean baseline" in tables


def test_figures_do_not_depend_on_the_users_matplotlib(tmp_path):
    """Compares the bytes with those of this process, which has matplotlib's defaults."""
    fabricate(tmp_path / "runs", best=0.5)
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfont.size: 30\nsavefig.transparent: True\n")
    code = "import sys; from indrnn.cli.report import main; main(sys.argv[1:])"
    theirs = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "MATPLOTLIBRC": f"{tmp_path}/matplotlibrc"}
    command = [sys.executable, "-c", code, str(tmp_path / "runs"), "--out", str(tmp_path / "theirs")]
    subprocess.run(command, env=os.environ | theirs, check=True, capture_output=True)
    _, paths = write_report([tmp_path / "runs"], tmp_path / "ours")
    for path in paths:
        assert path.read_bytes() == (tmp_path / "theirs" / path.relative_to(tmp_path / "ours")).read_bytes()


def test_number_formats():
    assert percent([0.9921, None, 0.9935]) == "99.28 ± 0.10"
    assert percent([None]) == ""
    assert [duration(value) for value in (95, 1500, 40_000)] == ["95 s", "25.0 min", "11.1 h"]
    assert extent([60_000, 41_000]) == "41,000–60,000"
    assert extent([5, 5]) == "5"


@pytest.mark.parametrize("what", ["missing", "damaged", "out"])
def test_wrong_folder_is_one_line_and_code_2(what, tmp_path, capsys):
    folder, out = tmp_path / "runs", tmp_path / "report"
    if what != "missing":
        run = fabricate(folder)
        (run / "config.yaml" if what == "damaged" else out).write_text("model: [")
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--out", str(out)])
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("indrnn-report: ")
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("file", "before", "after"),
    [
        ("config.yaml", r"\nseed: 0", ""),
        ("config.yaml", r"\nname: hurt", "\nname: [1]"),
        ("config.yaml", r"\nname: hurt", "\nname: ${nothing}"),
        ("config.yaml", r"name: adding", "name: subtracting"),
        ("metrics.csv", r"(train|val|test),[\d.]+", r"\1,nan"),
        ("result.json", r"\}\s*$", ""),
    ],
)
def test_damaged_run_is_skipped_with_its_file_named(tmp_path, caplog, file, before, after):
    data = {**ADDING, "length": 100}
    fabricate(tmp_path, "whole", data=data)
    hurt = fabricate(tmp_path, "hurt", data=data)
    text = (hurt / file).read_text()
    changed = re.sub(before, after, text)
    assert changed != text
    (hurt / file).write_text(changed)
    assert [group.name for group in collect([tmp_path])] == ["whole"]
    (line,) = caplog.messages
    assert line.startswith(f"skipped: {hurt / file}")


def test_one_seed_in_two_folders_is_refused_and_one_folder_twice_is_not(tmp_path):
    for folder in ("a", "b"):
        fabricate(tmp_path / folder)
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "a" / "mnist")
    with pytest.raises(UserError, match="same task, name and seed"):
        collect([tmp_path])
    assert len(collect([tmp_path / "a", tmp_path / "a" / "mnist"])[0].runs) == 1


def test_page_contains_tables_and_figures_and_needs_no_other_file(runs, tmp_path):
    fabricate(runs, "new", model={"name": "a<b>"})
    write_report([runs], tmp_path / "report")
    text = (tmp_path / "report" / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 3  # accuracy, error and loss
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    for group in collect([runs])[1:]:
        assert percent([result.test_accuracy for result in group.results]) in text
    assert all(words in text for words in ("a&lt;b&gt;", "model.name", "What to try next"))
    assert "$" not in text


def test_open_shows_the_page(runs, monkeypatch):
    pages = []
    monkeypatch.setattr("webbrowser.open", lambda page: pages.append(page) or True)
    main([str(runs), "--open"])
    assert pages == [(runs / "report" / "report.html").as_uri()]


def test_labels_name_the_model_and_what_sets_groups_apart(tmp_path):
    whole = {"name": "indrnn", "norm": "batch", "last_layer_min": True, "constraint": "clip"}
    changes = {None: {}, "a": {"norm": "none"}, "b": {"last_layer_min": False}, "c": {"constraint": "none"}}
    for tag, change in changes.items():
        fabricate(tmp_path, "fast_indrnn", tag=tag, model=whole | change)
    for tag, rate in (("a", 2e-4), ("b", 1e-3)):
        config = fabricate(tmp_path, "lstm", tag=tag) / "config.yaml"
        config.write_text(config.read_text().replace("lr: 0.0002", f"lr: {rate}"))
    for tag in ("p", "q"):
        fabricate(tmp_path, "gru", tag=tag)
    assert labels(collect([tmp_path])) == {
        "fast_indrnn": "IndRNN", "fast_indrnn-a": "IndRNN, no norm", "fast_indrnn-b": "IndRNN, no last-layer range",
        "fast_indrnn-c": "IndRNN, unbounded u", "lstm-a": "LSTM, lr 2e-4", "lstm-b": "LSTM, lr 1e-3",
        "gru-p": "GRU (gru-p)", "gru-q": "GRU (gru-q)",
    }  # fmt: skip
