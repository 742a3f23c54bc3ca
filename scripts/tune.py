#!/usr/bin/env python3
"""Tune on validation data, with equal trials for every network (pip install '.[sweep]').

    python scripts/tune.py indrnn --trials 12      run trials up to the twelfth; start it twice to use two cores
    python scripts/tune.py adding_lstm --trials 8  the adding problem at T = 500
    python scripts/tune.py --table                 only write results/tuning.md from the journal

Optuna's tree-structured Parzen estimator proposes the trials; the first one has the settings below. The studies are in
results/tuning.journal, which several processes can share and a later call continues. A trial is a run of indrnn-train
in outputs/tune, scored by its best validation accuracy, or its negative validation error. No test result is read here.
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

RESULTS = Path(__file__).resolve().parents[1] / "results"
# A list of choices, or the ends of a range with a logarithmic scale.
BOTH: dict[str, Any] = {
    "optimizer.lr": (5e-4, 8e-3), "optimizer.muon_lr": (3e-3, 0.06), "schedule.warmup": [0.02, 0.1, 0.3],
    "trainer.clip_norm": ["0.5", "1", "5"], "model.dropout": [0.0, 0.1], "trainer.label_smoothing": [0.0, 0.1],
}  # fmt: skip
INDRNN = {**BOTH, "model.gamma": [2.0, 5.0], "model.weight_init": ["small_uniform", "kaiming"]}
LSTM = {**BOTH, "model": ["lstm_chrono", "lstm"], "model.weight_init": ["glorot", "pytorch"]}
# The first trial of each study: settings that were known to train.
FIRST = {"optimizer.muon_lr": 0.02, "trainer.clip_norm": "1", "model.dropout": 0.0, "trainer.label_smoothing": 0.0}
FIRST_INDRNN = FIRST | {
    "optimizer.lr": 2e-3, "schedule.warmup": 0.3, "model.gamma": 5.0, "model.weight_init": "kaiming"
}  # fmt: skip
FIRST_LSTM = FIRST | {
    "optimizer.lr": 4.8e-3, "schedule.warmup": 0.02, "model": "lstm_chrono", "model.weight_init": "glorot"
}  # fmt: skip
ADDING = {"optimizer": ["adam", "muon"], "optimizer.lr": (1e-4, 8e-3)}
ADDING |= {key: BOTH[key] for key in ("optimizer.muon_lr", "trainer.clip_norm")}
FIRST_ADDING = {"optimizer": "adam", "optimizer.lr": 1e-3, "trainer.clip_norm": "1"}
FAST = ["experiment=fast", "trainer.max_steps=3436"]
T500 = ["experiment=length_study", "data.length=500", "trainer.max_steps=2000", "trainer.target_loss=null"]
T500 += ["trainer.eval_every=500"]
# The protocol, the network, what is varied, and the first trial.
STUDIES: dict[str, tuple[list[str], list[str], dict[str, Any], dict[str, Any]]] = {
    "indrnn": (FAST, ["model=indrnn"], INDRNN, FIRST_INDRNN),
    "indrnn_12layer": (FAST, ["model=indrnn_12layer"], INDRNN, FIRST_INDRNN),
    "lstm": (FAST, [], LSTM, FIRST_LSTM),
    "adding_indrnn": (T500, ["model=indrnn"], ADDING, FIRST_ADDING),
    "adding_lstm": (T500, ["model=lstm_chrono"], ADDING, FIRST_ADDING),
}
TITLE = """\
# Tuning of the fast protocol

Every trial, the best first, written by `python scripts/tune.py --table`. Unless a study says otherwise, a trial is a
run on full sequential MNIST with experiment=fast (Muon), 2 epochs, seed 0; bfloat16 for the IndRNN, float32 for the
LSTM. Scores are validation accuracy, n = 1. Short trials favor settings that learn early."""


def run_trial(trial: Trial, study: str, options: argparse.Namespace) -> float:
    protocol, overrides, space, _ = STUDIES[study]
    overrides = [*overrides]
    for key, choices in space.items():
        if isinstance(choices, list):
            overrides.append(f"{key}={trial.suggest_categorical(key, choices)}")
        elif key != "optimizer.muon_lr" or "optimizer=adam" not in overrides:
            overrides.append(f"{key}={trial.suggest_float(key, *choices, log=True):.3g}")
    trial.set_user_attr("overrides", overrides)
    root = options.work / study
    command = [sys.executable, "-m", "indrnn", *protocol, *overrides, *options.override, "seed=0"]
    command += [f"name=trial{trial.number}", f"output_root={root}"]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    (result,) = (json.loads(path.read_text()) for path in root.glob(f"*/trial{trial.number}/seed0/result.json"))
    trial.set_user_attr("updates", result["steps"])
    return -result["val_loss"] if result["val_accuracy"] is None else result["val_accuracy"]


def tune(name: str, storage: JournalStorage, options: argparse.Namespace) -> None:
    """Run trials; failed ones (a non-finite loss, a stopped run) do not count."""
    study = optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=4, multivariate=True, constant_liar=True),
    )  # fmt: skip
    study.enqueue_trial(STUDIES[name][3], skip_if_exists=True)
    counted = (TrialState.COMPLETE, TrialState.RUNNING)
    limit = optuna.study.MaxTrialsCallback(options.trials, states=counted)
    if len(study.get_trials(states=counted)) < options.trials:
        catch = subprocess.CalledProcessError
        study.optimize(lambda trial: run_trial(trial, name, options), callbacks=[limit], catch=catch)


def write_table(storage: JournalStorage) -> None:
    parts = [TITLE]
    for name in [name for name in STUDIES if name in optuna.get_all_study_names(storage)]:
        trials = optuna.load_study(study_name=name, storage=storage).trials
        settings = {t.number: f"`{' '.join(t.user_attrs.get('overrides', []))}`" for t in trials}
        done = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: -t.value)
        rows = [
            {
                "validation": f"{t.value:.2%}" if t.value > 0 else f"{-t.value:.5f}",
                "updates": f"{t.user_attrs['updates']:,}",
                "settings": settings[t.number],
            }
            for t in done
        ]
        parts += [f"## {name}: {len(done)} trials"]
        parts += [f"Validation mean squared error with `{' '.join(T500)}`."] if STUDIES[name][0] is T500 else []
        parts += [markdown_table(rows)] if rows else []
        parts += [f"Stopped or diverged: {settings[t.number]}" for t in trials if t.state == TrialState.FAIL]
    write_atomically(RESULTS / "tuning.md", "\n\n".join(parts) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=list(STUDIES))
    parser.add_argument("--trials", type=int, default=12, help="of the study, including earlier ones")
    parser.add_argument("--table", action="store_true", help="only write results/tuning.md")
    parser.add_argument("--work", type=Path, default=Path("outputs", "tune"), help="folder of the runs")
    parser.add_argument("override", nargs="*", help="for every trial, such as data.root=... trainer.precision=bfloat16")
    options = parser.parse_intermixed_args()
    storage = JournalStorage(JournalFileBackend(str(RESULTS / "tuning.journal")))
    if options.study and not options.table:
        tune(options.study, storage, options)
    write_table(storage)
