"""The rows of the results tables: the command of each one, and what others published for the same network and task.

Tags: [log] read in a released log, [code] in source, [README] in a project's README, [paper] in the paper itself.
"""

from dataclasses import dataclass

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
    """One line of a table, the runs results/runs/<task>/<name>/seed<k> of indrnn-train with ``overrides``."""

    task: str
    model: str
    protocol: str
    minutes: int | None
    """Estimate for one seed on one core of a Xeon with AMX (length_study, minGRU: AMD EPYC); None: needs a GPU."""
    num_seeds: int
    extra: tuple[str, ...] = ()
    """Overrides in addition to those of the protocol."""
    note: str = ""
    """Appended to the network's name: an ablation, which is not in figures and has no published results."""

    @property
    def name(self) -> str:
        tags = [setting.replace("tag=", "-") for setting in self.extra if setting.startswith("tag=")]
        return "".join([self.model if self.protocol == "tutorial" else f"{self.protocol}_{self.model}", *tags])

    @property
    def overrides(self) -> list[str]:
        experiment = [f"experiment={self.protocol}"] if self.protocol != "tutorial" else []
        if self.task.startswith("adding"):
            length = self.task.removeprefix("adding-T")
            return [*experiment, f"model={self.model}", f"data.length={length}", *self.extra]
        # bfloat16 was measured to cost the IndRNN no accuracy. Long runs log less often, to keep metrics.csv small.
        half = self.model in ("indrnn", "indrnn_12layer", "indrnn_residual") and self.protocol != "paper"
        precision = ["trainer.precision=bfloat16"] if half and "trainer.precision=float32" not in self.extra else []
        logging = "trainer.log_every=1700" if self.protocol == "paper" else "trainer.log_every=500"
        model = [f"model={self.model}"]
        if self.model == "lstm_chrono_matched":  # 86,122 parameters; the IndRNN of 6 x 128 units has 86,410
            model = ["model=lstm_chrono", "model.hidden_size=144", f"name={self.protocol}_{self.model}"]
        return [*experiment, *model, f"data={self.task}", *precision, *self.extra, logging]

    @property
    def network(self) -> str:
        adding = self.task.startswith("adding") and self.model == "indrnn"
        return "IndRNN, 2 × 128" if adding else NETWORKS[self.model] + f", {self.note}" * bool(self.note)

    @property
    def published(self) -> str:
        if self.protocol == "tutorial":
            return _PORT if self.model == "indrnn" else ""
        return "" if self.note else PUBLISHED.get(self.model, {}).get(self.task, "")


_PORT = "98.9 after 60,000 updates, two days (batzner/indrnn [README])"
_ADAM = ("optimizer=adam", "tag=adam")
_INDRNN_ADAM = (*_ADAM, "optimizer.lr=7.3e-4")
_LSTM_ADAM = (*_ADAM, "optimizer.lr=4.82e-3", "schedule.warmup=0.02")
# In the order in which scripts/reproduce.py runs them.
ROWS: tuple[Row, ...] = (
    Row(SEQUENTIAL, "indrnn", "fast", 20, 3),
    Row(SEQUENTIAL, "lstm_chrono", "fast", 55, 3),
    Row(SEQUENTIAL, "lstm_chrono_matched", "fast", 60, 1),
    Row(SEQUENTIAL, "indrnn_12layer", "fast", 40, 3),
    Row(SEQUENTIAL, "indrnn_12layer", "long", 120, 3),
    Row(SEQUENTIAL, "lstm_chrono", "long", 160, 1),
    Row(PERMUTED, "indrnn_12layer", "fast", 40, 1),
    Row(PERMUTED, "indrnn_12layer", "long", 120, 1),
    Row(PERMUTED, "indrnn", "fast", 20, 1),
    Row(PERMUTED, "lstm_chrono", "fast", 55, 1),
    *(
        Row(f"adding-T{T}", model, "length_study", minutes, 3 if T <= 1000 else 1, extra)
        for T in (100, 200, 500, 1000, 2000, 5000)
        for model, minutes, extra in (
            ("indrnn", T // 400 + 1, ("optimizer=muon",)),
            ("lstm_chrono", T // 160 + 1, ("trainer.max_steps=4000",) * (T == 5000)),
        )
    ),
    Row(SEQUENTIAL, "indrnn", "tutorial", 65, 3),
    Row(SEQUENTIAL, "lstm", "tutorial", 145, 3),
    Row(SEQUENTIAL, "indrnn", "fast", 18, 3, _INDRNN_ADAM, "Adam"),
    Row(SEQUENTIAL, "lstm_chrono", "fast", 28, 3, _LSTM_ADAM, "Adam"),
    Row(SEQUENTIAL, "lstm_chrono_matched", "fast", 32, 1, _LSTM_ADAM, "Adam"),
    Row(
        SEQUENTIAL, "indrnn_12layer", "fast", 75, 1, (*_INDRNN_ADAM, "trainer.max_steps=34_360", "model.dropout=0.1"),
        "Adam, 20 epochs, dropout",
    ),
    Row(
        SEQUENTIAL, "indrnn", "fast", 58, 3,
        ("optimizer=adam", "tag=adam-float32", "optimizer.lr=7.3e-4", "trainer.precision=float32"), "Adam, float32",
    ),
    Row(PERMUTED, "indrnn", "fast", 18, 1, _INDRNN_ADAM, "Adam"),
    Row(PERMUTED, "lstm_chrono", "fast", 28, 1, _LSTM_ADAM, "Adam"),
    Row(SEQUENTIAL, "indrnn", "fast", 20, 1, ("model.norm=none", "tag=no-norm"), "no batch norm"),
    Row(SEQUENTIAL, "indrnn", "fast", 20, 1, ("model.last_layer_min=false", "tag=no-range"), "no last-layer range"),
    Row(SEQUENTIAL, "indrnn", "fast", 20, 1, ("trainer.bn_samples=null", "tag=running-averages"), "running averages"),
    Row(SEQUENTIAL, "indrnn_residual", "fast", 35, 1),
    Row(SEQUENTIAL, "indrnn_dense", "fast", 60, 1),
    Row(SEQUENTIAL, "gru", "fast", 45, 1),
    Row(SEQUENTIAL, "mingru", "fast", 480, 1),  # 357 updates took 10 min (1 December 2026, PyTorch 2.14, n = 1)
    *(
        Row(task, model, "paper", None, 3, ("schedule.patience=[200,50,25]",) * longer)  # as the authors did [code]
        for model in ("indrnn", "indrnn_residual", "indrnn_12layer", "indrnn_dense")
        for task, longer in ((SEQUENTIAL, False), (PERMUTED, model == "indrnn_dense"))
    ),
)  # fmt: skip
