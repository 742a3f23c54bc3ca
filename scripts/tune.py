#!/usr/bin/env python3
"""Tune the fast protocol on validation, with as many trials for the LSTM as for the IndRNN (pip install '.[sweep]').

    python scripts/tune.py indrnn --trials 12      run trials up to the twelfth; start it twice to use two cores
    python scripts/tune.py --table                 write results/tuning.md again from the journal

The studies are Optuna's (tree-structured Parzen estimator; the first trials are the settings named below). They live
in results/tuning.journal, which several processes may share and a later call continues. A trial is a run of
indrnn-train (default: 2 epochs) in outputs/tune; its score is the best validation accuracy. Like every run it reads the
test set when it ends, but no test figure is looked at here.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

from indrnn.files import write_atomically
from indrnn.report.table import markdown_table

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3436  # 2 epochs of 55,000 images, 32 at a time


# What is tried: a list of choices, or the two ends of a range with a logarithmic scale.
Space = dict[str, list[Any] | tuple[float, float]]
BOTH: Space = {
    "optimizer.lr": (5e-4, 8e-3), "optimizer.muon_lr": (3e-3, 0.06), "schedule.warmup": [0.02, 0.1, 0.3],
    "trainer.clip_norm": ["0.5", "1", "5"], "model.dropout": [0.0, 0.1], "trainer.label_smoothing": [0.0, 0.1],
}  # fmt: skip
INDRNN: Space = {**BOTH, "model.gamma": [2.0, 5.0], "model.weight_init": ["small_uniform", "kaiming"]}
LSTM: Space = {**BOTH, "model": ["lstm_chrono", "lstm"], "model.weight_init": ["glorot", "pytorch"]}
# The settings that each study begins with: what was known to train before any tuning.
SKETCH = {"optimizer.muon_lr": 0.02, "trainer.clip_norm": "1", "model.dropout": 0.0, "trainer.label_smoothing": 0.0}
INDRNN_SKETCH = {
    **SKETCH, "optimizer.lr": 2e-3, "schedule.warmup": 0.3, "model.gamma": 5.0, "model.weight_init": "kaiming"
}  # fmt: skip
LSTM_SKETCH = {
    **SKETCH, "optimizer.lr": 4.8e-3, "schedule.warmup": 0.02, "model": "lstm_chrono", "model.weight_init": "glorot"
}  # fmt: skip
STUDIES: dict[str, tuple[Space, list[str], dict[str, Any]]] = {
    "indrnn": (INDRNN, ["model=indrnn"], INDRNN_SKETCH),
    "indrnn_12layer": (INDRNN, ["model=indrnn_12layer"], INDRNN_SKETCH),
    "lstm": (LSTM, [], LSTM_SKETCH),
}


def suggested(trial: Trial, key: str, choices: list[Any] | tuple[float, float]) -> str:
    if isinstance(choices, tuple):
        return f"{key}={trial.suggest_float(key, *choices, log=True):.3g}"
    return f"{key}={trial.suggest_categorical(key, choices)}"


def run_trial(trial: Trial, study: str, options: argparse.Namespace) -> float:
    space, fixed, _ = STUDIES[study]
    overrides = [*fixed, *(suggested(trial, key, choices) for key, choices in space.items())]
    trial.set_user_attr("overrides", overrides)
    root = options.work / study
    command = [
        str(Path(sys.executable).with_name("indrnn-train")), "experiment=fast", *overrides, *options.override,
        f"name=trial{trial.number}", f"output_root={root}", f"trainer.max_steps={options.steps}", "seed=0",
    ]  # fmt: skip
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    (result,) = (json.loads(path.read_text()) for path in root.glob(f"*/trial{trial.number}/seed0/result.json"))
    trial.set_user_attr("updates", result["steps"])
    return float(result["val_accuracy"])


def tune(name: str, storage: JournalStorage, options: argparse.Namespace) -> None:
    """Run trials; those that failed (a loss that was not finite, a run that was stopped) do not count."""
    study = optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=4, multivariate=True, constant_liar=True),
    )  # fmt: skip
    study.enqueue_trial(STUDIES[name][2], skip_if_exists=True)
    limit = optuna.study.MaxTrialsCallback(options.trials, states=(TrialState.COMPLETE, TrialState.RUNNING))
    if len(study.get_trials(states=(TrialState.COMPLETE, TrialState.RUNNING))) < options.trials:
        study.optimize(
            lambda trial: run_trial(trial, name, options), callbacks=[limit], catch=(subprocess.CalledProcessError,)
        )


def write_table(storage: JournalStorage, path: Path) -> None:
    parts = [
        "# Tuning of the fast protocol",
        "Every trial, the best first. Written by `python scripts/tune.py --table`; scores are validation accuracy on\n"
        "full sequential MNIST, seed 0, n = 1 each. Short trials favour settings that learn early, and are no results\n"
        "of the protocol.",
    ]
    for name in STUDIES:
        if name not in optuna.get_all_study_names(storage):
            continue
        trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
        done = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: -t.value)
        settings = {t.number: f"`{' '.join(t.user_attrs.get('overrides', []))}`" for t in trials}
        rows = [
            {"validation": f"{t.value:.2%}", "updates": f"{t.user_attrs['updates']:,}", "settings": settings[t.number]}
            for t in done
        ]
        parts += [f"## {name}: {len(done)} trials", *([markdown_table(rows)] if rows else [])]
        parts += [f"Failed: {settings[t.number]}" for t in trials if t.state == TrialState.FAIL]
    write_atomically(path, "\n\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=list(STUDIES))
    parser.add_argument("--trials", type=int, default=12, help="of the study, including earlier ones")
    parser.add_argument("--steps", type=int, default=STEPS, help="updates a trial")
    parser.add_argument("--table", action="store_true", help="write results/tuning.md")
    parser.add_argument("--journal", type=Path, default=ROOT / "results" / "tuning.journal")
    parser.add_argument("--work", type=Path, default=Path("outputs", "tune"), help="where the runs go")
    parser.add_argument(
        "override", nargs="*", help="for every trial, for example data.root=... trainer.precision=bfloat16"
    )
    options = parser.parse_intermixed_args()
    storage = JournalStorage(JournalFileBackend(str(options.journal)))
    if options.study:
        tune(options.study, storage, options)
    if options.table or options.study:
        write_table(storage, ROOT / "results" / "tuning.md")


if __name__ == "__main__":
    main()
