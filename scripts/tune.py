#!/usr/bin/env python3
"""Tune the fast protocol on validation, with as many trials for the LSTM as for the IndRNN (pip install '.[sweep]').

    python scripts/tune.py indrnn --trials 10      make trials up to the tenth; call it twice to use two cores
    python scripts/tune.py --table                 write results/tuning.md anew from the journal

The studies are Optuna's (tree-structured Parzen estimator; the first trials are the settings named below). They live
in results/tuning.journal, which several processes may share and a later call continues. A trial is a run of
indrnn-train (default: 2 epochs) in outputs/tune; its score is the best validation accuracy. Like every run it reads the
test set when it ends, but no test figure is looked at here.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import Trial, TrialState

ROOT = Path(__file__).resolve().parents[1]
STEPS = 3436  # 2 epochs of 55,000 images, 32 at a time


def indrnn(trial: Trial) -> list[str]:
    clip = trial.suggest_categorical("trainer.clip_norm", ["1", "5", "null"])
    return [
        f"optimizer.lr={trial.suggest_float('optimizer.lr', 5e-4, 8e-3, log=True):.3g}",
        f"schedule.warmup={trial.suggest_categorical('schedule.warmup', [0.1, 0.3, 0.5])}",
        f"trainer.clip_norm={clip}",
        f"model.dropout={trial.suggest_categorical('model.dropout', [0.0, 0.05, 0.1])}",
        f"optimizer.weight_decay={trial.suggest_categorical('optimizer.weight_decay', [0.0, 1e-5, 1e-4])}",
        f"model.gamma={trial.suggest_categorical('model.gamma', [1.2, 2.0, 5.0])}",
        f"model.weight_init={trial.suggest_categorical('model.weight_init', ['small_uniform', 'kaiming'])}",
    ]


def lstm(trial: Trial) -> list[str]:
    clip = trial.suggest_categorical("trainer.clip_norm", ["0.25", "1", "5"])
    return [
        f"schedule={trial.suggest_categorical('schedule', ['cosine', 'one_cycle'])}",
        f"optimizer.lr={trial.suggest_float('optimizer.lr', 3e-4, 5e-3, log=True):.3g}",
        f"schedule.warmup={trial.suggest_categorical('schedule.warmup', [0.02, 0.1, 0.3])}",
        f"trainer.clip_norm={clip}",
        f"model={trial.suggest_categorical('model', ['lstm_chrono', 'lstm'])}",
        f"model.weight_init={trial.suggest_categorical('model.weight_init', ['glorot', 'pytorch'])}",
    ]


# The settings that each study begins from: what was known to train before any tuning.
SKETCH = {
    "optimizer.lr": 2e-3, "schedule.warmup": 0.3, "trainer.clip_norm": "5", "model.dropout": 0.0,
    "optimizer.weight_decay": 0.0, "model.gamma": 2.0, "model.weight_init": "small_uniform",
}  # fmt: skip
CHRONO = {
    "schedule": "cosine", "optimizer.lr": 1e-3, "schedule.warmup": 0.02, "trainer.clip_norm": "1",
    "model": "lstm_chrono", "model.weight_init": "glorot",
}  # fmt: skip
STUDIES: dict[str, tuple[Callable[[Trial], list[str]], list[str], list[dict[str, Any]]]] = {
    "indrnn": (indrnn, ["model=indrnn"], [SKETCH, {**SKETCH, "optimizer.lr": 4e-3, "trainer.clip_norm": "1"}]),
    "indrnn_12layer": (indrnn, ["model=indrnn_12layer"], [SKETCH]),
    "lstm": (lstm, [], [CHRONO, {**CHRONO, "optimizer.lr": 2e-3}]),
}


def run_trial(trial: Trial, study: str, options: argparse.Namespace) -> float:
    suggest, fixed, _ = STUDIES[study]
    overrides = [*fixed, *suggest(trial)]
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
    """Trials that failed (a loss that was not finite, a run that was stopped) do not count."""
    study = optuna.create_study(
        study_name=name, storage=storage, direction="maximize", load_if_exists=True,
        sampler=optuna.samplers.TPESampler(n_startup_trials=4, multivariate=True, constant_liar=True),
    )  # fmt: skip
    for settings in STUDIES[name][2]:
        study.enqueue_trial(settings, skip_if_exists=True)
    limit = optuna.study.MaxTrialsCallback(options.trials, states=(TrialState.COMPLETE, TrialState.RUNNING))
    if len(study.get_trials(states=(TrialState.COMPLETE, TrialState.RUNNING))) < options.trials:
        study.optimize(
            lambda trial: run_trial(trial, name, options),
            callbacks=[limit],
            catch=(subprocess.CalledProcessError,),
        )


def write_table(storage: JournalStorage, path: Path) -> None:
    lines = [
        "# Tuning of the fast protocol", "",
        "Every trial, the best first. Written by `python scripts/tune.py --table`; scores are validation accuracy on",
        "full sequential MNIST, seed 0, n = 1 each. Short trials favour settings that learn early: they are no results",
        "of the protocol.",
        "",
    ]  # fmt: skip
    for name in STUDIES:
        if name not in optuna.get_all_study_names(storage):
            continue
        trials = optuna.load_study(study_name=name, storage=storage).get_trials(deepcopy=False)
        done = sorted((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: -t.value)
        lines += [f"## {name}: {len(done)} trials", "", "| validation | updates | settings |", "|---|---|---|"]
        lines += [
            f"| {t.value:.2%} | {t.user_attrs['updates']:,} | `{' '.join(t.user_attrs['overrides'])}` |" for t in done
        ]
        failed = [t for t in trials if t.state == TrialState.FAIL]
        lines += ["", *(f"Failed: `{' '.join(t.user_attrs.get('overrides', []))}`" for t in failed), ""]
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", choices=list(STUDIES))
    parser.add_argument("--trials", type=int, default=10, help="of the study, those made before included")
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
