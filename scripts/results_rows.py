"""The rows of the results table: what each one runs, and what others published for the same network and task.

Tags: [log] read in a released log, [code] in source, [README] in a project's README, [paper] in the paper itself.
"""

from dataclasses import dataclass
from typing import Any

SEEDS = (0, 1, 2)
# The tag of runs that end after their first 1,700 updates, which can be compared with the logs without a GPU.
FIRST_TAG = "first1700"

PORT = "batzner/indrnn"
SOURCES = (
    "IndRNN, [log] and [paper]: Sunnydreamrain/IndRNN_pytorch, folder pixelMNIST, and Li et al. 2018, 2019 (arXiv "
    "1803.04831, 1910.06251); one run each.",
    "LSTM: in this order Arjovsky et al. 2015 (arXiv 1511.06464; 128 units), Cooijmans et al. 2016 (arXiv 1603.09025; "
    "100 units), and as quoted in arXiv 2309.08045 (256 units).",
)

TUTORIAL = "tutorial"
PAPER = "paper"
FAST = "fast"
LENGTH = "length"

# Protocol -> what it is and where ours differs from its source.
PROTOCOLS = {
    TUTORIAL: (
        "Adam, lr 2e-4, gradient norm ≤ 5, batch 32, until validation > 99 % or 60,000 updates, 55,000/5,000 split. "
        f"Source: the sequential-MNIST script of {PORT}. Deviation: batch-norm statistics are re-estimated from 500 "
        "training images before each evaluation. The LSTM runs exactly the same, untuned, as the IndRNN does."
    ),
    PAPER: (
        "Adam, lr 2e-4, ×0.1 after 100 (then 50, 25) evaluations without gain, each time going on from the best "
        "checkpoint, gradients within ±10, dropout 0.1, weight decay 1e-4 on all but u and biases, |u| ≤ 5^(1/784), "
        "batch 32, 57,000/3,000 split. Source: the authors' code. Deviations: they wait two evaluations longer; "
        "split and permutation come from named seeds (theirs are unseeded); pixels 2x/255 − 1 instead of "
        "2 (x/256 − 0.5); batch-norm statistics from training images instead of a pass over the validation set; the "
        "last layer's u starts in its range, which the released plain network probably does not apply; accuracy over "
        "10,000 images instead of 10,016."
    ),
    FAST: (
        "Ours: the tutorial's networks, data and selection in 10 epochs (17,180 updates) under one cycle of the rate, "
        "gradient norm ≤ 1; 12 layers in 20 epochs and with dropout 0.1, otherwise as 6. Peak, warm-up, initialisation "
        "and gamma are tuned on validation, with as many trials for the LSTM as for the IndRNN (tuning.md)."
    ),
    LENGTH: (
        "The port's adding problem: its two layers of 128 without norm, Adam, lr 2e-4, gradient norm ≤ 5, batch 50, "
        "but 4,000 updates instead of up to 20,000. The same settings for every network, except that the LSTM with "
        "chrono initialisation has its own: lr 1e-3, gradient norm ≤ 1."
    ),
}


@dataclass(frozen=True)
class Row:
    """One line of the table: indrnn-train with ``overrides``, once for each seed, gives
    results/runs/<task>/<name>/seed<k>.

    ``first_1700``: the log's validation accuracy (%) after the first 1,700 updates; ``earlier_name``: the name of the
    same run when one word chose protocol and network; ``minutes``: an estimate for one run alone on one core of a Xeon
    with AMX, None if a CPU would take days.
    """

    task: str
    name: str
    network: str
    protocol: str
    overrides: tuple[str, ...]
    published: str = ""
    first_1700: float | None = None
    earlier_name: str | None = None
    seeds: tuple[int, ...] = SEEDS
    minutes: int | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names that this row's runs have and had."""
        return (self.name,) if self.earlier_name is None else (self.name, self.earlier_name)

    @property
    def first_names(self) -> tuple[str, ...]:
        """The names of this row's runs that end after 1,700 updates."""
        return tuple(f"{name}-{FIRST_TAG}" for name in self.names)


def _row(task: str, model: str, protocol: str, *extra: str, network: str | None = None, **figures: Any) -> Row:
    """``extra``: overrides beside the protocol's; ``figures``: further fields of the row."""
    experiment = () if protocol == TUTORIAL else (f"experiment={protocol}",)
    tag = "".join(f"-{setting.removeprefix('tag=')}" for setting in extra if setting.startswith("tag="))
    name = (model if protocol == TUTORIAL else f"{protocol}_{model}") + tag
    earlier = _EARLIER_NAMES.get(model) if protocol == PAPER else None
    # Long runs log less often, to keep their metrics.csv small.
    logging = "trainer.log_every=1700" if protocol == PAPER else "trainer.log_every=500"
    overrides = (*experiment, f"model={model}", f"data={task}", *extra, logging)
    return Row(task, name, network or _NETWORKS[model], protocol, overrides, earlier_name=earlier, **figures)


def _adding(length: int, model: str, minutes: int, *extra: str, tag: str = "4k") -> Row:
    settings = ("trainer.max_steps=4000", "trainer.eval_every=250", f"tag={tag}", *extra)
    overrides = ("experiment=length_study", f"model={model}", f"data.length={length}", *settings)
    name, network = f"length_study_{model}-{tag}", _ADDING_NETWORKS[model]
    return Row(f"adding-T{length}", name, network, LENGTH, overrides, seeds=(0,), minutes=minutes)


_NETWORKS = {
    "indrnn": "IndRNN, plain, 6 × 128",
    "indrnn_12layer": "IndRNN, plain, 12 × 128",
    "indrnn_residual": "IndRNN, residual, 5 blocks of 128",
    "indrnn_dense": "IndRNN, dense (8, 6, 4), growth 16",
    "lstm": "LSTM, 128 units",
    "lstm_chrono": "LSTM with chrono initialisation, 128 units",
    "lstm_matched": "LSTM, 144 units (parameters as IndRNN's)",
    "lstm_chrono_matched": "LSTM with chrono initialisation, 144 units (parameters as IndRNN's)",
}
_ADDING_NETWORKS = {**_NETWORKS, "indrnn": "IndRNN, 2 × 128", "rnn": "RNN, 128 units"}
_EARLIER_NAMES = {
    "indrnn": "paper_6layer",
    "indrnn_12layer": "paper_12layer",
    "indrnn_residual": "paper_residual",
    "indrnn_dense": "paper_dense",
}
SEQUENTIAL, PERMUTED = "mnist", "mnist_permuted"

_PLAIN_6 = {SEQUENTIAL: "99.04 [log], 99.0 [paper]", PERMUTED: "95.64 [log], 96.0 [paper]"}
_PLAIN_12 = {
    SEQUENTIAL: "99.46 [log], 99.37 [paper]",
    PERMUTED: "96.53 [log] (97.04 without the last layer's range), 96.84 [paper]",
}
_RESIDUAL = {SEQUENTIAL: "99.38 [log], 99.39 [paper]", PERMUTED: "96.86 [log], 97.02 [paper]"}
_DENSE = {SEQUENTIAL: "99.48 [log], 99.48 [paper]", PERMUTED: "97.16 [log], 97.2 [paper]"}
_LSTM = {SEQUENTIAL: "98.2; 98.9; 98.8", PERMUTED: "88.0; 90.2; 92.9"}

_BFLOAT16 = "trainer.precision=bfloat16"
_PORT = f"98.9 after 60,000 updates, two days ({PORT} [README])"

# In the order in which scripts/reproduce.py runs them.
ROWS: tuple[Row, ...] = (
    _row(SEQUENTIAL, "indrnn", FAST, _BFLOAT16, published=_PLAIN_6[SEQUENTIAL], minutes=18, seeds=(0, 1, 2, 3, 4)),
    _row(SEQUENTIAL, "lstm_chrono", FAST, published=_LSTM[SEQUENTIAL], minutes=28),
    _row(SEQUENTIAL, "lstm_chrono_matched", FAST, minutes=32),
    _row(SEQUENTIAL, "indrnn", FAST, "tag=float32", minutes=58),
    _row(SEQUENTIAL, "indrnn", TUTORIAL, _BFLOAT16, published=_PORT, minutes=65),
    _row(SEQUENTIAL, "lstm", TUTORIAL, minutes=100),
    _row(SEQUENTIAL, "lstm_matched", TUTORIAL, minutes=110),
    _row(SEQUENTIAL, "indrnn_12layer", FAST, _BFLOAT16, published=_PLAIN_12[SEQUENTIAL], minutes=75),
    _row(PERMUTED, "indrnn", FAST, _BFLOAT16, published=_PLAIN_6[PERMUTED], minutes=18),
    _row(PERMUTED, "lstm_chrono", FAST, published=_LSTM[PERMUTED], minutes=28),
    *(_adding(T, "indrnn", minutes) for T, minutes in ((500, 5), (1000, 10), (2000, 20), (5000, 50))),
    *(_adding(T, "lstm", T // 25) for T in (500, 1000, 2000)),
    *(
        _adding(T, "lstm_chrono", T // 25, "optimizer.lr=1e-3", "trainer.clip_norm=1.0", tag="4k-lr1e-3")
        for T in (500, 1000, 2000)
    ),
    *(_adding(T, "rnn", T // 60) for T in (500, 1000, 2000)),
    _row(
        SEQUENTIAL, "lstm_chrono", FAST, "trainer.max_steps=51_540", "tag=30epochs", minutes=85,
        network="LSTM with chrono initialisation, 128 units, 30 epochs", published=_LSTM[SEQUENTIAL],
    ),
    _row(
        SEQUENTIAL, "indrnn", FAST, _BFLOAT16, "model.norm=none", "tag=without-norm", minutes=18,
        network="IndRNN, plain, 6 × 128, without batch norm",
    ),
    _row(
        SEQUENTIAL, "indrnn", FAST, _BFLOAT16, "model.last_layer_min=false", "tag=without-range", minutes=18,
        network="IndRNN, plain, 6 × 128, without the last layer's range",
    ),
    _row(
        SEQUENTIAL, "indrnn", FAST, _BFLOAT16, "model.constraint=none", "tag=unbounded", minutes=18,
        network="IndRNN, plain, 6 × 128, without a bound on u",
    ),
    _row(PERMUTED, "indrnn_12layer", FAST, _BFLOAT16, published=_PLAIN_12[PERMUTED], minutes=75),
    _row(SEQUENTIAL, "indrnn_residual", FAST, _BFLOAT16, published=_RESIDUAL[SEQUENTIAL], minutes=35),
    _row(SEQUENTIAL, "indrnn_dense", FAST, published=_DENSE[SEQUENTIAL], minutes=60),
    _row(PERMUTED, "indrnn_dense", FAST, published=_DENSE[PERMUTED], minutes=60),
    _row(SEQUENTIAL, "indrnn", PAPER, published=_PLAIN_6[SEQUENTIAL], first_1700=77.7),
    _row(PERMUTED, "indrnn", PAPER, published=_PLAIN_6[PERMUTED], first_1700=63.1),
    _row(SEQUENTIAL, "indrnn_residual", PAPER, published=_RESIDUAL[SEQUENTIAL], first_1700=89.2),
    _row(PERMUTED, "indrnn_residual", PAPER, published=_RESIDUAL[PERMUTED], first_1700=69.9),
    _row(SEQUENTIAL, "indrnn_12layer", PAPER, published=_PLAIN_12[SEQUENTIAL], first_1700=83.4),
    _row(PERMUTED, "indrnn_12layer", PAPER, published=_PLAIN_12[PERMUTED], first_1700=62.7),
    _row(SEQUENTIAL, "indrnn_dense", PAPER, published=_DENSE[SEQUENTIAL], first_1700=88.2),
    # The authors waited longer here [code].
    _row(PERMUTED, "indrnn_dense", PAPER, "schedule.patience=[200,50,25]", published=_DENSE[PERMUTED], first_1700=51.0),
)  # fmt: skip
