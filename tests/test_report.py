"""indrnn-report: what a reader finds in the tables and figures, and what a wrong folder answers."""

import base64
import csv
import os
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from matplotlib.lines import Line2D

from fabricated_runs import MNIST, fabricate
from indrnn.cli.report import main
from indrnn.data.adding import AddingSplit
from indrnn.errors import UserError
from indrnn.record.metrics import MetricsWriter
from indrnn.report.curves import band, binned
from indrnn.report.runs import by_task, collect, extent, find_runs, in_words, read_run
from indrnn.report.style import Line, figure, finish, label_lines, legend_below, looks
from indrnn.report.table import duration, markdown_report, percent, task_rows, write_report

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
    return {row["name"]: row for row in task_rows(collect([root]))}


def test_a_model_has_its_colour_in_every_figure_and_its_runs_a_line_style_each():
    for names in (["fast_6layer", "indrnn"], ["indrnn-cpu", "zebra"], ["demo_indrnn", "indrnn", "paper_6layer"]):
        look = looks({**dict.fromkeys(names, "indrnn"), "lstm-cpu": "lstm"})
        assert {look[name]["color"] for name in names} == {looks({"any": "indrnn"})["any"]["color"]}
        assert len({look[name]["linestyle"] for name in names}) == len(names)
        assert look["lstm-cpu"] == looks({"lstm": "lstm"})["lstm"]
    unknown = looks({name: name for name in ("a", "b", "indrnn", "lstm", "rnn")})
    assert len({one["color"] for one in unknown.values()}) == 5


def test_the_report_has_every_file_and_ends_with_the_tensorboard_command_and_link(runs, tmp_path, capsys):
    main([str(runs), "--out", str(tmp_path / "report")])
    printed = capsys.readouterr().out.splitlines()
    made = {path.relative_to(tmp_path / "report").as_posix() for path in (tmp_path / "report").rglob("*.*")}
    figures = {f"mnist/{stem}.{kind}" for stem in ("accuracy", "error", "loss") for kind in ("png", "svg")}
    assert made == {"report.html", "summary.csv", "table.md"} | figures
    assert printed[-2].endswith(f"tensorboard --logdir {runs}")
    assert "http://localhost:6006/?pinnedCards=" in printed[-1]
    table = (tmp_path / "report" / "table.md").read_text(encoding="utf-8").splitlines()
    assert table[: len(table)] == printed[: len(table)]


def test_the_table_is_the_mean_and_sample_deviation_over_seeds_best_first(runs):
    groups = collect([runs])
    rows = task_rows(groups)
    assert [(row["rank"], row["name"], row["n"]) for row in rows] == [("1", "indrnn", "3"), ("2", "lstm", "3")]
    accuracies = [100 * result.test_accuracy for result in groups[0].results]
    assert rows[0]["test %"] == f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
    assert rows[0]["device"] == "NVIDIA H200"
    low, high = map(float, rows[0]["95 %"].split("–"))
    assert low < np.mean(accuracies) < high


def test_the_summary_has_a_row_a_run_with_its_own_figures(runs, tmp_path):
    write_report([runs], tmp_path / "report")
    with open(tmp_path / "report" / "summary.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6
    for row, result in zip(rows, (r for group in collect([runs]) for r in group.results), strict=True):
        assert (row["name"], int(row["seed"]), row["state"]) == (result.name, result.seed, "finished")
        assert float(row["test_accuracy"]) == result.test_accuracy
        assert float(row["test_ci95_low"]) == result.test_ci95[0]


def test_a_single_run_is_marked_and_has_no_deviation(tmp_path):
    fabricate(tmp_path, "indrnn", **SMALL)
    assert _rows(tmp_path)["indrnn"]["test %"].endswith("†")
    assert "±" not in _rows(tmp_path)["indrnn"]["test %"]
    assert "† n = 1" in markdown_report(collect([tmp_path]))


def test_unfinished_runs_are_shown_as_such_and_enter_no_mean(runs):
    before = _rows(runs)["lstm"]
    fabricate(runs, "lstm", 3, best=0.2, finished=False, **SMALL)
    rows = _rows(runs)
    assert rows["lstm"] == before
    assert rows["lstm seed 3, unfinished"]["steps"] == "200"
    assert rows["lstm seed 3, unfinished"]["test %"] == ""


def test_a_task_with_unfinished_runs_only_is_reported_too(tmp_path):
    fabricate(tmp_path / "runs", "indrnn", finished=False, **SMALL)
    tables, paths = write_report([tmp_path / "runs"], tmp_path / "report")
    assert "indrnn seed 0, unfinished" in tables
    assert all(path.stat().st_size for path in paths)


def test_rows_within_the_test_sets_noise_share_a_rank(tmp_path):
    for name, best in (("a", 0.99), ("b", 0.99), ("c", 0.95)):
        fabricate(tmp_path, name, best=best, **(SMALL | {"half": 0.5}))
    assert sorted(row["rank"] for row in _rows(tmp_path).values()) == ["1=", "1=", "3"]


def test_averaging_runs_of_unlike_configurations_is_pointed_out(runs):
    assert "not alike" not in markdown_report(collect([runs]))
    fabricate(runs, "lstm", 3, best=0.9, **(SMALL | {"steps": 700}))
    assert "The runs of lstm are not alike: they differ in trainer.max_steps." in markdown_report(collect([runs]))


def test_no_better_than_chance_is_said(tmp_path):
    fabricate(tmp_path, "lstm", best=0.0, **(SMALL | {"eval_every": 600}))
    assert "learnt nothing" in markdown_report(collect([tmp_path]))


def test_mnist5k_is_never_called_mnist_accuracy(tmp_path):
    subset = {"name": "mnist5k", "validation_size": 500, "test_size": 1000, "split_seed": 0, "permutation": None}
    fabricate(tmp_path / "runs", "indrnn", data=subset, **SMALL)
    tables, _ = write_report([tmp_path / "runs"], tmp_path / "report")
    assert "not MNIST accuracy" in tables
    assert "mnist5k: 5,000-image subset" in (tmp_path / "report/mnist5k/accuracy.svg").read_text(encoding="utf-8")


def test_permutations_and_tags_are_kept_apart(tmp_path):
    for permutation in ("seed92916", "bitrev"):
        fabricate(tmp_path, data={**MNIST, "name": "mnist_permuted", "permutation": permutation}, **SMALL)
    fabricate(tmp_path, tag="wide", **SMALL)
    fabricate(tmp_path, **SMALL)
    groups = collect([tmp_path])
    assert list(by_task(groups)) == ["mnist", "mnist_permuted", "mnist_permuted-bitrev"]
    assert [group.name for group in groups if group.task == "mnist"] == ["indrnn", "indrnn-wide"]


def test_the_length_study_draws_error_against_length_and_states_the_updates(tmp_path):
    for length in (20, 100, 1000):
        for name in ("indrnn", "lstm"):
            fabricate(tmp_path / "runs", name, best=0.001, data={**ADDING, "length": length}, **SMALL)
    tables, paths = write_report([tmp_path / "runs"], tmp_path / "report")
    assert [heading for heading in tables.splitlines() if heading.startswith("##")] == [
        f"## Adding problem, T = {length}" for length in ("20", "100", "1,000")
    ]
    assert tmp_path / "report/length_study.png" in paths
    svg = (tmp_path / "report/length_study.svg").read_text(encoding="utf-8")
    for text in ("error after 600 updates", "1,000", "LSTM (n = 1)"):
        assert text in svg


def test_the_level_drawn_for_the_adding_problem_is_that_of_the_split(tmp_path):
    for name, seed in (("indrnn", 0), ("lstm", 1)):
        for length in (20, 100):
            data = {**ADDING, "length": length, "validation_size": 50, "test_size": 60, "data_seed": seed}
            fabricate(tmp_path / "runs", name, data=data, **SMALL)

    def level(split, seeds=(0, 1), lengths=(20, 100)):
        starts = {"val": (1 << 61, 50), "test": (1 << 62, 60)}[split]
        splits = [AddingSplit(length, seed, *starts) for seed in seeds for length in lengths]
        errors = sorted(s.batch(torch.arange(s.size))[1].double().var(correction=0).item() for s in splits)
        return f"always answering the mean: {errors[0]:.3f} to {errors[-1]:.3f}"

    tables, _ = write_report([tmp_path / "runs"], tmp_path / "report")
    assert level("val", lengths=[20]) in (tmp_path / "report/adding-T20/error.svg").read_text()
    assert "always answering the mean: 0.167" in (tmp_path / "report/adding-T20/loss.svg").read_text()
    assert level("test") in (tmp_path / "report/length_study.svg").read_text()
    assert level("test") in tables


def test_figures_name_the_seeds_the_chance_level_and_the_units_as_text(runs, tmp_path):
    write_report([runs], tmp_path / "report")
    svg = (tmp_path / "report/mnist/accuracy.svg").read_text(encoding="utf-8")
    for text in ("IndRNN (n = 3)", "LSTM (n = 3)", "chance: 10 %", "Validation accuracy (%)", "batch of 32", "seconds"):
        assert text in svg


def test_the_same_runs_give_the_same_bytes(runs, tmp_path):
    _, first = write_report([runs], tmp_path / "a")
    _, second = write_report([runs], tmp_path / "b")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_band_covers_what_all_seeds_have_and_keeps_the_longer_ones():
    short = (np.array([0.0, 1.0, 2.0]), np.array([0.0, 1.0, 2.0]))
    long = (np.array([0.0, 2.0, 4.0]), np.array([2.0, 4.0, 6.0]))
    curve = band([short, long])
    assert curve.x.tolist() == [0, 1, 2]
    assert curve.mean.tolist() == [1, 2, 3]
    assert (curve.low.tolist(), curve.high.tolist()) == ([0, 1, 2], [2, 3, 4])
    assert [(x.tolist(), y.tolist()) for x, y in curve.rest] == [([2, 4], [4, 6])]


def test_seeds_that_share_no_range_are_drawn_one_by_one():
    curve = band([(np.array([1.0]), np.array([0.5])), (np.array([2.0, 3.0]), np.array([0.1, 0.2]))])
    assert len(curve.x) == 0
    assert len(curve.rest) == 2


def test_binning_keeps_the_mean_of_what_it_covers():
    x = np.arange(1.0, 101.0)
    at, values = binned(x, x**2, np.linspace(0, 100, 11))
    assert len(at) <= 12
    assert np.isclose(values[0], np.mean(x[:9] ** 2))


def test_numbers_read_as_a_person_would_write_them():
    assert percent([0.9921, 0.9935]) == "99.28 ± 0.10"
    assert [duration(value) for value in (95, 1500, 40_000)] == ["95 s", "25.0 min", "11.1 h"]
    assert extent([60_000, 41_000]) == "41,000–60,000"


@pytest.mark.parametrize("what", ["missing", "empty", "file", "damaged", "out"])
def test_a_wrong_folder_is_one_line_and_code_2(what, tmp_path, capsys):
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
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("indrnn-report: ")
    assert all("Traceback" not in line for line in lines)


def _nan_losses(text):
    """metrics.csv with every loss not a number."""
    header, *rows = text.splitlines()
    return "\n".join([header, *(",".join([*row.split(",")[:4], "nan", *row.split(",")[5:]]) for row in rows), ""])


@pytest.mark.parametrize(
    ("file", "change", "reason"),
    [
        ("config.yaml", lambda text: text.replace("seed: 0\n", "", 2), "seed is missing"),
        ("config.yaml", lambda text: text.replace("\nname: hurt", ""), "name is missing"),
        ("config.yaml", lambda text: text.replace("\nname: hurt", "\nname: [1]"), "name cannot be"),
        ("config.yaml", lambda text: text.replace("  length: 100\n", ""), "Missing key length"),
        ("config.yaml", lambda text: text.replace("batch_size: 32", "batch_size: many"), "trainer.batch_size"),
        ("config.yaml", lambda text: text.replace("name: adding", "name: subtracting"), "subtracting"),
        ("config.yaml", lambda text: text.replace("\nname: hurt", "\nname: ${nothing}"), "name cannot be"),
        ("metrics.csv", _nan_losses, "none of its losses"),
        ("metrics.csv", lambda text: text.replace(",train,", ",,", 1), "damaged in line"),
        ("metrics.csv", lambda text: text.replace("5.200,", "nan,", 1), "damaged in line"),
        ("result.json", lambda text: text[:-20], "damaged"),
    ],
)
def test_a_damaged_run_is_left_out_with_its_reason_and_the_rest_reported(tmp_path, caplog, file, change, reason):
    data = {**ADDING, "length": 100}
    fabricate(tmp_path, "whole", data=data, **SMALL)
    hurt = fabricate(tmp_path, "hurt", data=data, **SMALL)
    text = (hurt / file).read_text()
    assert change(text) != text
    (hurt / file).write_text(change(text))
    tables, _ = write_report([tmp_path], tmp_path / "report")
    (line,) = caplog.messages
    assert line.startswith(f"left out: {hurt / file}")
    assert reason in line
    assert "whole" in tables
    assert "hurt" not in tables


def test_a_reader_that_has_had_enough_ends_the_report_quietly(runs, tmp_path):
    code = "import os, sys\nfrom indrnn.cli.report import main\nmain(sys.argv[1:])"
    reading, writing = os.pipe()
    os.close(reading)
    words = [sys.executable, "-c", code, str(runs), "--out", str(tmp_path / "report")]
    ended = subprocess.run(words, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert ended.stderr.splitlines() == [f"indrnn-report: reading the runs below {runs} and drawing ..."]


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
    with pytest.raises(UserError, match="nowhere"):
        list(find_runs(tmp_path / "nowhere"))


def test_a_curve_has_the_rows_of_its_split_that_have_a_value(tmp_path):
    path = fabricate(tmp_path, **SMALL)
    with MetricsWriter(path / "metrics.csv", None) as metrics:
        metrics.row(10, 0.1, 1.5, "train", 2.0, 0.1, 2e-4, 1.0)
        metrics.row(10, 0.1, 2.5, "val", 1.9, 0.2)
        metrics.row(20, 0.2, 3.5, "val", 1.8, None)
    run = read_run(path)
    step, accuracy = run.curve("val", "accuracy")
    assert (step.tolist(), accuracy.tolist()) == ([10], [0.2])
    seconds, loss = run.curve("val", "loss", x="seconds")
    assert (seconds.tolist(), loss.tolist()) == ([2.5, 3.5], [1.9, 1.8])


class Page(HTMLParser):
    """What a browser would show: the text, and where its pictures come from."""

    def __init__(self, text):
        super().__init__()
        self.words, self.sources = [], []
        self.feed(text)

    def handle_data(self, data):
        self.words.append(data)

    def handle_starttag(self, tag, attrs):
        self.sources += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_has_tables_figures_and_differing_settings_and_needs_no_other_file(runs, tmp_path):
    write_report([runs], tmp_path / "report")
    page = Page((tmp_path / "report" / "report.html").read_text(encoding="utf-8"))
    assert len(page.sources) == 3  # accuracy, error and loss
    for source in page.sources:
        assert base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).startswith(b"<?xml")
    cells = [word for word in page.words if word.strip()]
    for group in collect([runs]):
        assert percent([result.test_accuracy for result in group.results]) in cells
    at = cells.index("model.name")
    assert cells[at : at + 3] == ["model.name", "indrnn", "lstm"]


def test_open_shows_the_page(runs, tmp_path, monkeypatch, capsys):
    pages = []
    monkeypatch.setattr("webbrowser.open", lambda page: not pages.append(page))
    monkeypatch.setattr("indrnn.report.table.draw", lambda *_: [])
    main([str(runs), "--out", str(tmp_path / "my report"), "--open"])
    assert pages == [(tmp_path / "my report" / "report.html").as_uri()]
    monkeypatch.setattr("webbrowser.open", lambda page: False)
    with pytest.raises(SystemExit) as ended:
        main([str(runs), "--out", str(tmp_path / "my report"), "--open"])
    assert ended.value.code == 2
    assert "open it by hand" in capsys.readouterr().err


def test_groups_are_called_by_their_model_and_what_sets_them_apart(tmp_path):
    fabricate(tmp_path, "indrnn", **SMALL)
    for tag, rate in (("a", 2e-4), ("b", 1e-3)):
        folder = fabricate(tmp_path, "lstm", tag=tag, **SMALL)
        text = (folder / "config.yaml").read_text().replace("lr: 0.0002", f"lr: {rate}")
        (folder / "config.yaml").write_text(text)
    words = in_words(collect([tmp_path]))
    assert words == {"indrnn": "IndRNN, lr 2e-4", "lstm-a": "LSTM, lr 2e-4", "lstm-b": "LSTM, lr 1e-3"}


def test_what_a_network_goes_without_is_said_of_it_alone(tmp_path):
    whole = {"name": "indrnn", "norm": "batch", "last_layer_min": True, "constraint": "clip"}
    changes = {None: {}, "a": {"norm": "none"}, "b": {"last_layer_min": False}, "c": {"constraint": "none"}}
    for tag, change in changes.items():
        fabricate(tmp_path, "fast_indrnn", tag=tag, model=whole | change, **SMALL)
    assert in_words(collect([tmp_path])) == {
        "fast_indrnn": "IndRNN", "fast_indrnn-a": "IndRNN, without norm",
        "fast_indrnn-b": "IndRNN, without the last layer's range", "fast_indrnn-c": "IndRNN, u without bound",
    }  # fmt: skip


def test_times_are_drawn_only_where_they_compare(tmp_path):
    fabricate(tmp_path / "runs", "indrnn", **SMALL)
    fabricate(tmp_path / "runs", "lstm", device="AMD EPYC", **SMALL)
    write_report([tmp_path / "runs"], tmp_path / "report")
    assert "Training time" not in (tmp_path / "report/mnist/accuracy.svg").read_text(encoding="utf-8")


def test_labels_at_line_ends_keep_apart_or_are_left_to_a_legend():
    with figure() as (drawing, axes):
        axes.plot([0, 1], [0, 1])
        assert label_lines(drawing, axes, [(1, 1, "upper", "black"), (1, 1, "lower", "black")])
        drawing.draw_without_rendering()
        first, second = (text.get_window_extent() for text in axes.texts)
        assert not first.overlaps(second)
        assert not label_lines(drawing, axes, [(1, 1, "late", "black"), (0.5, 1, "ends early", "black")])


def test_a_long_note_stays_within_the_figure_and_a_long_legend_takes_no_height_from_the_axes():
    with figure() as (drawing, _):
        legend = legend_below(drawing, {"line": Line2D([], [])}, "a word " * 60)
        drawing.draw_without_rendering()
        assert drawing.bbox.x0 <= legend.get_window_extent().x0
        assert legend.get_window_extent().x1 <= drawing.bbox.x1

    def height(names):
        with figure() as (drawing, axes):
            look = looks(dict.fromkeys(names, "indrnn"))
            finish(drawing, axes, "title", [Line(name, look[name], None) for name in names])
            drawing.draw_without_rendering()
            return axes.get_window_extent().height

    assert height([f"a label of {number} that is long enough for a line of its own" for number in range(9)]) >= (
        0.8 * height(["one"])
    )
