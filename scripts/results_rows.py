"""The rows of the results tables: the command of each one, and what others published for the same network and task.

Tags: [log] read in a released log, [code] in source, [README] in a project's README, [paper] in the paper itself.
"""

from dataclasses import dataclass
from typing import Any

SOURCES = (
    "IndRNN, [log] and [paper]: Sunnydreamrain/IndRNN_pytorch, folder pixelMNIST, and Li et al. 2018, 2019 (arXiv "
    "1803.04831, 1910.06251); one run each. Validation in the logs after the first 1,700 updates, 6 layers, residual, "
    "12 layers, dense: 77.7, 89.2, 83.4, 88.2; permuted: 63.1, 69.9, 62.7, 51.0.",
    "LSTM, in this order: Arjovsky et al. 2015 (arXiv 1511.06464; 128 units), Cooijmans et al. 2016 (arXiv 1603.09025; "
    "100 units), and as quoted in arXiv 2309.08045 (256 units).",
)
# What each protocol is, and where ours deviates from its source.
PROTOCOLS = {
    "tutorial": (
        "Adam, lr 2e-4, gradient norm ≤ 5, batch 32, until validation > 99 % or 60,000 updates, 55,000/5,000 split. "
        "Source: the sequential-MNIST script of https://github.com/batzner/indrnn. Deviation: batch-norm statistics "
        "are re-estimated from 500 training images before each evaluation. The LSTM uses the same settings, untuned."
    ),
    "paper": (
        "Adam, lr 2e-4, ×0.1 after 100 (then 50, 25) evaluations without improvement, each time from the best "
        "checkpoint, gradients within ±10, dropout 0.1, weight decay 1e-4 except on u and biases, |u| ≤ 5^(1/784), "
        "batch 32, 57,000/3,000 split. Source: the authors' code. Deviations: two more evaluations of patience; seeded "
        "split and permutation; pixels 2x/255 − 1 instead of 2 (x/256 − 0.5); batch-norm statistics from training "
        "images instead of a pass over the validation set; the last layer's u starts in its range, which the released "
        "plain network probably does not apply; accuracy over 10,000 images instead of 10,016."
    ),
    "fast": (
        "Ours: the tutorial's networks, data and selection in 10 epochs (17,180 updates) with Muon for the hidden "
        "matrices, Adam for all other parameters, a one-cycle schedule, and gradient norm ≤ 1. Tuned on validation "
        "data with an equal number of trials per network (tuning.md). Runs with -adam use Adam alone."
    ),
    "long": "As fast, in 30 epochs (51,540 updates), with dropout.",
    "length_study": (
        "The adding problem of the same repository: two layers of 128 without norm, batch 50, up to 20,000 updates. "
        "The same search for both networks at T = 500."
    ),
}
NETWORKS = {
    "indrnn": "IndRNN, 6 × 128",
    "indrnn_12layer": "IndRNN, 12 × 128",
    "indrnn_residual": "IndRNN, residual, 5 blocks of 128",
    "indrnn_dense": "IndRNN, dense (8, 6, 4), growth 16",
    "lstm": "LSTM, 128 units",
    "lstm_chrono": "LSTM (chrono), 128 units",
    "lstm_chrono_matched": "LSTM (chrono), 144 units (parameters as IndRNN's)",
    "gru": "GRU, 128 units",
    "mingru": "minGRU",
}
SEQUENTIAL, PERMUTED = "mnist", "mnist_permuted"
_LSTM = {SEQUENTIAL: "98.2; 98.9; 98.8", PERMUTED: "88.0; 90.2; 92.9"}
PUBLISHED = {
    "indrnn": {SEQUENTIAL: "99.04 [log], 99.0 [paper]", PERMUTED: "95.64 [log], 96.0 [paper]"},
    "indrnn_12layer": {
        SEQUENTIAL: "99.46 [log], 99.37 [paper]",
        PERMUTED: "96.53 [log] (97.04 without the last layer's range), 96.84 [paper]",
    },
    "indrnn_residual": {SEQUENTIAL: "99.38 [log], 99.39 [paper]", PERMUTED: "96.86 [log], 97.02 [paper]"},
    "indrnn_dense": {SEQUENTIAL: "99.48 [log], 99.48 [paper]", PERMUTED: "97.16 [log], 97.2 [paper]"},
    "lstm": _LSTM,
    "lstm_chrono": _LSTM,
}


@dataclass(frozen=True)
class Row:
    """One line of a table: indrnn-train with ``overrides``, once per seed, writes results/runs/<task>/<name>/seed<k>.

    ``minutes``: estimate for one seed on one core of a Xeon with AMX; None: needs a GPU. ``ablation``: not in figures.
    """

    task: str
    name: str
    network: str
    protocol: str
    overrides: tuple[str, ...]
    published: str
    seeds: tuple[int, ...]
    minutes: int | None
    ablation: bool


def _row(
    task: str, model: str, protocol: str, minutes: int | None, n: int, *extra: str, note: str = "", **fields: Any
) -> Row:
    """``extra``: further overrides; ``note``: appended to the network's name, for ablations."""
    experiment = () if protocol == "tutorial" else (f"experiment={protocol}",)
    tag = "".join(f"-{setting.removeprefix('tag=')}" for setting in extra if setting.startswith("tag="))
    name = (model if protocol == "tutorial" else f"{protocol}_{model}") + tag
    # bfloat16 was measured to cost the IndRNN no accuracy. Long runs log less often, to keep metrics.csv small.
    fast = model.startswith("indrnn") and protocol != "paper" and model != "indrnn_dense"
    precision = ("trainer.precision=bfloat16",) if fast and not any("precision" in setting for setting in extra) else ()
    logging = "trainer.log_every=1700" if protocol == "paper" else "trainer.log_every=500"
    # 86,122 parameters; the IndRNN of 6 x 128 units has 86,410.
    matched = ("model.hidden_size=144", f"name={protocol}_{model}") if model.endswith("_matched") else ()
    choice = f"model={model.removesuffix('_matched')}"
    overrides = (*experiment, choice, *matched, f"data={task}", *precision, *extra, logging)
    published = fields.get("published", "" if note else PUBLISHED.get(model, {}).get(task, ""))
    network = ", ".join(filter(None, [NETWORKS[model], note]))
    return Row(task, name, network, protocol, overrides, published, tuple(range(n)), minutes, bool(note))


def _adding(length: int, model: str, n: int, minutes: int, *extra: str) -> Row:
    overrides = ("experiment=length_study", f"model={model}", f"data.length={length}", *extra)
    network = "IndRNN, 2 × 128" if model == "indrnn" else NETWORKS[model]
    name = f"length_study_{model}"
    return Row(f"adding-T{length}", name, network, "length_study", overrides, "", tuple(range(n)), minutes, False)


_ADAM = ("optimizer=adam", "tag=adam")
_LSTM_ADAM = ("optimizer.lr=4.82e-3", "schedule.warmup=0.02")
_PORT = "98.9 after 60,000 updates, two days (batzner/indrnn [README])"
# In the order in which scripts/reproduce.py runs them.
ROWS: tuple[Row, ...] = (
    _row(SEQUENTIAL, "indrnn", "fast", 20, 3),
    _row(SEQUENTIAL, "lstm_chrono", "fast", 55, 3),
    _row(SEQUENTIAL, "lstm_chrono_matched", "fast", 60, 1),
    _row(SEQUENTIAL, "indrnn_12layer", "fast", 40, 3),
    _row(SEQUENTIAL, "indrnn_12layer", "long", 120, 3),
    _row(SEQUENTIAL, "lstm_chrono", "long", 160, 1),
    _row(PERMUTED, "indrnn_12layer", "fast", 40, 1),
    _row(PERMUTED, "indrnn_12layer", "long", 120, 1),
    _row(PERMUTED, "indrnn", "fast", 20, 1),
    _row(PERMUTED, "lstm_chrono", "fast", 55, 1),
    *(
        _adding(T, model, 3 if T <= 1000 else 1, T // 20 if model == "indrnn" else min(T // 5, 400), *extra)
        for T in (100, 200, 500, 1000, 2000, 5000)
        for model in ("indrnn", "lstm_chrono")
        for extra in [("trainer.max_steps=4000",) if (T, model) == (5000, "lstm_chrono") else ()]
    ),
    _row(SEQUENTIAL, "indrnn", "tutorial", 65, 3, published=_PORT),
    _row(SEQUENTIAL, "lstm", "tutorial", 145, 3, published=""),
    _row(SEQUENTIAL, "indrnn", "fast", 18, 3, *_ADAM, "optimizer.lr=7.3e-4", note="Adam"),
    _row(SEQUENTIAL, "lstm_chrono", "fast", 28, 3, *_ADAM, *_LSTM_ADAM, note="Adam"),
    _row(SEQUENTIAL, "lstm_chrono_matched", "fast", 32, 1, *_ADAM, *_LSTM_ADAM, note="Adam"),
    _row(
        SEQUENTIAL, "indrnn_12layer", "fast", 75, 1, *_ADAM, "optimizer.lr=7.3e-4", "trainer.max_steps=34_360",
        "model.dropout=0.1", note="Adam, 20 epochs, dropout",
    ),
    _row(
        SEQUENTIAL, "indrnn", "fast", 58, 3, "optimizer=adam", "tag=adam-float32", "optimizer.lr=7.3e-4",
        "trainer.precision=float32", note="Adam, float32",
    ),
    _row(PERMUTED, "indrnn", "fast", 18, 1, *_ADAM, "optimizer.lr=7.3e-4", note="Adam"),
    _row(PERMUTED, "lstm_chrono", "fast", 28, 1, *_ADAM, *_LSTM_ADAM, note="Adam"),
    _row(SEQUENTIAL, "indrnn", "fast", 20, 1, "model.norm=none", "tag=no-norm", note="no batch norm"),
    _row(
        SEQUENTIAL, "indrnn", "fast", 20, 1, "model.last_layer_min=false", "tag=no-range", note="no last-layer range"
    ),
    _row(SEQUENTIAL, "indrnn", "fast", 20, 1, "model.constraint=none", "tag=unbounded", note="unbounded u"),
    _row(SEQUENTIAL, "indrnn_residual", "fast", 35, 1),
    _row(SEQUENTIAL, "indrnn_dense", "fast", 60, 1),
    _row(SEQUENTIAL, "gru", "fast", 45, 1),
    _row(SEQUENTIAL, "mingru", "fast", 25, 1),
    *(
        _row(task, model, "paper", None, 3, *extra)
        for model in ("indrnn", "indrnn_residual", "indrnn_12layer", "indrnn_dense")
        for task in (SEQUENTIAL, PERMUTED)
        # The authors waited longer here [code].
        for extra in [("schedule.patience=[200,50,25]",) if (model, task) == ("indrnn_dense", PERMUTED) else ()]
    ),
)  # fmt: skip
