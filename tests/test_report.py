"""indrnn-report: the tables and figures that a user finds, and the messages for wrong input."""

import os
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from fabricated_runs import MNIST, fabricate
from indrnn.cli.report import main
from indrnn.errors import UserError
from indrnn.report.curves import mean_curve
from indrnn.report.page import write_report
from indrnn.report.runs import by_task, collect, find_runs, labels
from indrnn.report.style import figure, looks, save
from indrnn.report.table import duration, extent, markdown_report, markdown_table, percent, task_table

SMALL = {"steps": 600, "eval_every": 50, "log_every": 10, "half": 40.0}
ADDING = {"name": "adding", "validation_size": 1000, "test_size": 10_000, "data_seed": 0}


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "outputs"
    for seed in range(3):
        fabricate(root, "indrnn", seed, best=0.99, **SMALL)
        fabricate(root, "lstm", seed, best=0.9, **SMALL)
    return root


def _rows(root):
    return task_table(collect([root])).set_index("name").to_dict("index")


def _text(path):
    return path.read_text(encoding="utf-8")


def test_models_keep_their_color_and_runs_of_one_model_differ_in_line_style():
    for names in (["fast_6layer", "indrnn"], ["indrnn-cpu", "zebra"], ["demo_indrnn", "indrnn", "paper_6layer"]):
        look = looks({**dict.fromkeys(names, "indrnn"), "lstm-cpu": "lstm"})
        assert {look[name]["color"] for name in names} == {looks({"any": "indrnn"})["any"]["color"]}
        assert len({str(look[name]["linestyle"]) for name in names}) == len(names)
        assert look["lstm-cpu"] == looks({"lstm": "lstm"})["lstm"]
    unknown = looks({name: name for name in ("a", "b", "indrnn", "lstm", "rnn")})
    assert len({one["color"] for one in unknown.values()}) == 5


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
    assert table["device"][0] == "NVIDIA H200"


def test_columns_that_are_equal_in_all_rows_are_stated_once(runs):
    text = markdown_report(collect([runs]))
    assert text.count("NVIDIA H200") == 1
    header = next(line for line in text.splitlines() if line.startswith("| network"))
    assert "test %" in header
    assert "precision" not in header


def test_summary_has_one_row_per_run(runs, tmp_path):
    fabricate(runs, "gru", finished=False, **SMALL)
    write_report([runs], tmp_path / "report")
    table = pd.read_csv(tmp_path / "report" / "summary.csv").set_index(["name", "seed"])
    assert len(table) == 7
    for group in collect([runs]):
        for run in group.finished:
            row = table.loc[(run.name, run.seed)]
            assert (row["state"], row["test_accuracy"]) == ("finished", run.result.test_accuracy)
            assert (row["test_ci95_low"], row["path"]) == (run.result.test_ci95[0], run.path.as_posix())
    assert table.loc[("gru", 0), "state"] == "unfinished"


def test_single_run_has_a_mark_and_an_interval_instead_of_a_deviation(tmp_path):
    fabricate(tmp_path, "indrnn", **SMALL)
    row = _rows(tmp_path)["indrnn"]
    assert row["test %"].endswith("†")
    assert "±" not in row["test %"]
    low, high = map(float, row["95 % CI"].split("–"))
    assert low < float(row["test %"].split()[0]) < high


def test_unfinished_runs_are_listed_but_not_averaged(runs):
    before = _rows(runs)["lstm"]
    fabricate(runs, "lstm", 3, best=0.2, finished=False, **SMALL)
    rows = _rows(runs)
    assert rows["lstm"] == before
    assert rows["lstm seed 3, unfinished"]["updates"] == "200"
    assert rows["lstm seed 3, unfinished"]["test %"] == ""


@pytest.mark.parametrize("done", [600, 40])
def test_report_of_unfinished_runs_only(tmp_path, done):
    fabricate(tmp_path / "runs", "indrnn", finished=False, **(SMALL | {"steps": 3 * done, "eval_every": 40}))
    tables, paths = write_report([tmp_path / "runs"], tmp_path / "report")
    assert "indrnn seed 0, unfinished" in tables
    assert all(path.stat().st_size for path in paths)


def test_groups_of_different_settings_are_pointed_out(runs):
    assert "different settings" not in markdown_report(collect([runs]))
    fabricate(runs, "lstm", 3, best=0.9, **(SMALL | {"steps": 700}))
    assert "lstm have different settings: trainer.max_steps" in markdown_report(collect([runs]))


def test_chance_level_is_marked(tmp_path):
    fabricate(tmp_path, "lstm", best=0.0, **(SMALL | {"eval_every": 600}))
    assert _rows(tmp_path)["lstm"]["test %"].endswith("‡")


def test_mnist5k_is_never_called_mnist_accuracy(tmp_path):
    subset = {"name": "mnist5k", "validation_size": 500, "test_size": 1000, "split_seed": 0, "permutation": None}
    fabricate(tmp_path / "runs", "indrnn", data=subset, **SMALL)
    tables, _ = write_report([tmp_path / "runs"], tmp_path / "report")
    assert "not MNIST accuracy" in tables
    assert "5,000-image subset" in _text(tmp_path / "report/mnist5k/accuracy.svg")


def test_permutations_and_tags_are_separate_groups(tmp_path):
    for permutation in ("seed92916", "bitrev"):
        fabricate(tmp_path, data={**MNIST, "name": "mnist_permuted", "permutation": permutation}, **SMALL)
    fabricate(tmp_path, tag="wide", **SMALL)
    fabricate(tmp_path, **SMALL)
    groups = collect([tmp_path])
    assert list(by_task(groups)) == ["mnist", "mnist_permuted", "mnist_permuted-bitrev"]
    assert [group.name for group in groups if group.task.folder == "mnist"] == ["indrnn", "indrnn-wide"]


def test_length_study_is_drawn_for_several_lengths_with_its_baseline(tmp_path):
    for length in (20, 100, 1000):
        for name in ("indrnn", "lstm"):
            fabricate(tmp_path / "runs", name, best=0.001, data={**ADDING, "length": length}, **SMALL)
    tables, paths = write_report([tmp_path / "runs"], tmp_path / "report")
    headings = [line for line in tables.splitlines() if line.startswith("##")]
    assert headings == [f"## Adding problem, T = {length}" for length in ("20", "100", "1,000")]
    assert tmp_path / "report/length_study.png" in paths
    text = _text(tmp_path / "report/length_study.svg")
    assert all(word in text for word in ("600 updates", "1,000", "LSTM (n = 1)", "predict-the-mean baseline: 0.16"))
    assert "predict-the-mean baseline" in tables


def test_accuracy_axis_starts_at_90_percent_where_runs_are_good(runs, tmp_path):
    write_report([runs], tmp_path / "good")
    good = _text(tmp_path / "good/mnist/accuracy.svg")
    assert all(text in good for text in ("IndRNN (n = 3)", "LSTM (n = 3)", "batch of 32", "seconds"))
    assert "chance" not in good
    fabricate(tmp_path / "poor", best=0.5, **SMALL)
    write_report([tmp_path / "poor"], tmp_path / "report")
    assert "chance: 10 %" in _text(tmp_path / "report/mnist/accuracy.svg")


def test_groups_that_differ_in_precision_only_are_drawn_once(tmp_path):
    fabricate(tmp_path / "runs", **SMALL)
    copy = fabricate(tmp_path / "runs", tag="bf16", **SMALL) / "config.yaml"
    copy.write_text(copy.read_text().replace("float32", "bfloat16"))
    write_report([tmp_path / "runs"], tmp_path / "report")
    text = _text(tmp_path / "report/mnist/error.svg")
    assert text.count("(n = 1)") == 1
    assert "indrnn-bf16" in text


def test_same_runs_give_the_same_bytes(runs, tmp_path):
    _, first = write_report([runs], tmp_path / "a")
    _, second = write_report([runs], tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "nonsense", "Qt5Agg", ""])
def test_figures_do_not_depend_on_the_users_matplotlib(runs, tmp_path, backend):
    """Compares the bytes with those of this process, which has matplotlib's defaults."""
    (tmp_path / "matplotlibrc").write_text(
        "text.usetex: True\nfont.size: 30\nsavefig.transparent: True\naxes.prop_cycle: cycler('color', ['red'])\n"
    )
    code = "import sys; from indrnn.cli.report import main; main(sys.argv[1:])"
    environment = os.environ | {"MPLBACKEND": backend, "MATPLOTLIBRC": str(tmp_path / "matplotlibrc")}
    command = [sys.executable, "-c", code, str(runs), "--out", str(tmp_path / "theirs")]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    write_report([runs], tmp_path / "ours")
    for path in (tmp_path / "ours").rglob("*.*g"):
        assert path.read_bytes() == (tmp_path / "theirs" / path.relative_to(tmp_path / "ours")).read_bytes()


def test_drawing_leaves_matplotlib_as_it_was(tmp_path):
    import matplotlib

    before = dict(matplotlib.rcParams)
    with figure() as (drawing, axes):
        axes.plot([0, 1])
        save(drawing, tmp_path, "a")
    assert dict(matplotlib.rcParams) == before


def test_mean_curve_covers_the_steps_that_all_seeds_have():
    short = pd.DataFrame({"step": [1, 2, 3], "x": [1.0, 2.0, 3.0], "y": [0.0, 1.0, 2.0]})
    long = pd.DataFrame({"step": [1, 2, 4], "x": [3.0, 4.0, 6.0], "y": [2.0, 3.0, 6.0]})
    mean = mean_curve([short, long])
    assert mean[["step", "x", "y", "low", "high"]].to_numpy().tolist() == [[1, 2, 1, 0, 2], [2, 3, 2, 1, 3]]
    assert mean_curve([short, long[2:]]).empty


def test_number_formats():
    assert percent([0.9921, None, 0.9935]) == "99.28 ± 0.10"
    assert percent([None]) == ""
    assert [duration(value) for value in (95, 1500, 40_000)] == ["95 s", "25.0 min", "11.1 h"]
    assert extent([60_000, 41_000]) == "41,000–60,000"
    assert extent([5, 5]) == "5"
    assert markdown_table([{"a": "x", "n": "1"}, {"a": "yy", "n": "22"}]).splitlines()[1:3] == [
        "| --- | --: |", "| x   |   1 |"
    ]  # fmt: skip


@pytest.mark.parametrize("what", ["missing", "empty", "file", "damaged", "out"])
def test_wrong_folder_is_one_line_and_code_2(what, tmp_path, capsys):
    folder, out = tmp_path / "runs", tmp_path / "report"
    if what == "empty":
        folder.mkdir()
    elif what == "file":
        folder.write_text("")
    elif what == "damaged":
        (fabricate(folder, **SMALL) / "config.yaml").write_text("model: [")
    elif what == "out":
        fabricate(folder, **SMALL)
        out.write_text("")
    with pytest.raises(SystemExit) as ended:
        main([str(folder), "--out", str(out)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("indrnn-report: ")
    assert "Traceback" not in error


def _nan_losses(text):
    """metrics.csv with every loss not a number."""
    header, *rows = text.splitlines()
    return "\n".join([header, *(",".join([*row.split(",")[:4], "nan", *row.split(",")[5:]]) for row in rows), ""])


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.yaml", lambda text: text.replace("seed: 0\n", "", 2)),
        ("config.yaml", lambda text: text.replace("\nname: hurt", "")),
        ("config.yaml", lambda text: text.replace("\nname: hurt", "\nname: [1]")),
        ("config.yaml", lambda text: text.replace("\nname: hurt", "\nname: ${nothing}")),
        ("config.yaml", lambda text: text.replace("  length: 100\n", "")),
        ("config.yaml", lambda text: text.replace("batch_size: 32", "batch_size: many")),
        ("config.yaml", lambda text: text.replace("name: adding", "name: subtracting")),
        ("metrics.csv", _nan_losses),
        ("metrics.csv", lambda text: text.replace(",train,", ",,", 1)),
        ("result.json", lambda text: text[:-20]),
    ],
)
def test_damaged_run_is_skipped_with_its_file_named(tmp_path, caplog, file, change):
    data = {**ADDING, "length": 100}
    fabricate(tmp_path, "whole", data=data, **SMALL)
    hurt = fabricate(tmp_path, "hurt", data=data, **SMALL)
    text = (hurt / file).read_text()
    assert change(text) != text
    (hurt / file).write_text(change(text))
    assert [group.name for group in collect([tmp_path])] == ["whole"]
    (line,) = caplog.messages
    assert line.startswith(f"skipped: {hurt / file}")


def test_one_seed_in_two_folders_is_refused_and_one_folder_twice_is_not(tmp_path):
    for folder in ("a", "b"):
        fabricate(tmp_path / folder, **SMALL)
    with pytest.raises(UserError, match="same task, name and seed"):
        collect([tmp_path])
    assert len(collect([tmp_path / "a", tmp_path / "a" / "mnist"])[0].runs) == 1


def test_runs_are_found_at_any_depth_in_order(tmp_path):
    for place in ("b", "a", "a/x/y", ".hidden"):
        fabricate(tmp_path / place, finished=place != "b", **SMALL)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "config.yaml").write_text("of: another program")
    runs = list(find_runs(tmp_path))
    places = [run.path.relative_to(tmp_path).as_posix() for run in runs]
    assert places == [f"{place}/mnist/indrnn/seed0" for place in ("a", "a/x/y", "b")]
    assert [run.result is None for run in runs] == [False, False, True]
    assert [run.path for run in find_runs(runs[0].path)] == [runs[0].path]


@pytest.mark.parametrize("link", ["mnist", "mnist/indrnn", "mnist/indrnn/seed0"])
def test_runs_are_found_through_symbolic_links(tmp_path, link):
    fabricate(tmp_path / "real", **SMALL)
    gathered = tmp_path / "gathered" / link
    gathered.parent.mkdir(parents=True)
    gathered.symlink_to(tmp_path / "real" / link)
    (tmp_path / "gathered" / "loop").symlink_to(tmp_path / "gathered")
    assert [run.path for run in find_runs(tmp_path / "gathered")] == [tmp_path / "gathered/mnist/indrnn/seed0"]
    assert len(collect([tmp_path])[0].runs) == 1


def test_page_contains_tables_and_figures_and_needs_no_other_file(runs, tmp_path):
    fabricate(runs, "new", model={"name": "a<b>"}, **SMALL)
    write_report([runs], tmp_path / "report")
    text = _text(tmp_path / "report" / "report.html")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert len(sources) == 3  # accuracy, error and loss
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    for group in collect([runs])[1:]:
        assert percent([result.test_accuracy for result in group.results]) in text
    assert all(words in text for words in ("a&lt;b&gt;", "model.name", "What to try next"))
    assert "$" not in text


def test_open_shows_the_page(runs, tmp_path, monkeypatch, capsys):
    pages = []
    monkeypatch.setattr("webbrowser.open", lambda page: not pages.append(page))
    main([str(runs), "--out", str(tmp_path / "my report"), "--open"])
    assert pages == [(tmp_path / "my report" / "report.html").as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda page: False)
    with pytest.raises(SystemExit) as ended:
        main([str(runs), "--out", str(tmp_path / "my report"), "--open"])
    assert ended.value.code == 2
    assert "report.html" in capsys.readouterr().err


def test_labels_name_the_model_and_what_sets_groups_apart(tmp_path):
    whole = {"name": "indrnn", "norm": "batch", "last_layer_min": True, "constraint": "clip"}
    changes = {None: {}, "a": {"norm": "none"}, "b": {"last_layer_min": False}, "c": {"constraint": "none"}}
    for tag, change in changes.items():
        fabricate(tmp_path, "fast_indrnn", tag=tag, model=whole | change, **SMALL)
    for tag, rate in (("a", 2e-4), ("b", 1e-3)):
        config = fabricate(tmp_path, "lstm", tag=tag, **SMALL) / "config.yaml"
        config.write_text(config.read_text().replace("lr: 0.0002", f"lr: {rate}"))
    for tag in ("p", "q"):
        fabricate(tmp_path, "gru", tag=tag, **SMALL)
    assert labels(collect([tmp_path])) == {
        "fast_indrnn": "IndRNN", "fast_indrnn-a": "IndRNN, no norm", "fast_indrnn-b": "IndRNN, no last-layer range",
        "fast_indrnn-c": "IndRNN, unbounded u", "lstm-a": "LSTM, lr 2e-4", "lstm-b": "LSTM, lr 1e-3",
        "gru-p": "GRU (gru-p)", "gru-q": "GRU (gru-q)",
    }  # fmt: skip


def test_time_is_drawn_only_where_all_runs_used_one_device(tmp_path):
    fabricate(tmp_path / "runs", "indrnn", **SMALL)
    fabricate(tmp_path / "runs", "lstm", device="AMD EPYC", **SMALL)
    write_report([tmp_path / "runs"], tmp_path / "report")
    assert "Training time" not in _text(tmp_path / "report/mnist/accuracy.svg")
