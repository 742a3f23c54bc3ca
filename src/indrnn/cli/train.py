"""``indrnn-train``: `indrnn.training.train` under Hydra."""

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

import indrnn

from ..errors import UserError
from . import leads, run, say

PROGRAM = "indrnn-train"
_USAGE = """\
indrnn-train trains one network on one task, evaluates it and records the run.

  indrnn-train                                       the IndRNN, tutorial protocol, full sequential MNIST
  indrnn-train model=lstm seed=1 optimizer.lr=1e-3   key=value sets any key listed below
  indrnn-train experiment=paper model=indrnn_12layer a protocol, and a network to train with it
  indrnn-train -m model=indrnn,lstm seed=0,1,2       a sweep: one run per combination
  indrnn-train tag=variant optimizer.lr=1e-3         tag= keeps runs with other settings apart
  indrnn-train model=lstm --help                     this list for another choice

Flags: -m sweep; --cfg job print the configuration, --resolve with references replaced; --config-dir FOLDER add your own
choices; --version; -sc install=bash tab completion (also zsh, fish); --hydra-help more.
Rerun a command to resume an interrupted run; finished runs are skipped."""


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a run failed, 2 bad request, 128 + n stopped by signal n."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises its exceptions instead of printing them
    run(PROGRAM, _command)


def _command() -> int:
    import hydra
    from hydra._internal.utils import get_args_parser

    from ..config.compose import CONFIG_DIR, keep_text, load_config, one_line
    from . import sweep

    if "--version" in sys.argv:
        print(f"indrnn {indrnn.__version__}")
        return 0
    # Hydra's parser expects all flags on one side of the overrides.
    words = sorted(sys.argv[1:], key=lambda word: "=" in word and not word.startswith("-"))
    sys.argv[1:] = map(keep_text, words)
    options = get_args_parser().parse_args()
    if options.help:
        print(_help(options))
        return 0
    if options.cfg:  # Hydra prints it without checks and without the size of the network
        cfg = load_config(options.overrides, options.config_name or "train", options.config_dir)
        from ..data import make_task
        from ..models import build_model

        count = sum(parameter.numel() for parameter in build_model(cfg.model, make_task(cfg.data)).parameters())
        say(PROGRAM, f"{count:,} parameters")
    code = 0
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="train")(_job)()
    except sweep.JobError:
        code = 1
    except (ValueError, OverflowError) as error:
        raise UserError(one_line(error)) from error
    sweep.print_table()
    if sweep.stopped_by:
        raise KeyboardInterrupt(sweep.stopped_by)
    return code


def _help(options: Any) -> str:
    """The choices of every group, and every key with its value and meaning."""
    from ..config.compose import CONFIG_DIR, as_typed, load_config, settings
    from ..config.schema import SCHEMAS

    cfg = load_config(options.overrides, options.config_name or "train", options.config_dir)
    lines = [_USAGE, "", "Choices:"]
    for group in [*SCHEMAS, "experiment"]:
        folders = [Path(folder, group) for folder in (CONFIG_DIR, options.config_dir) if folder is not None]
        names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        lines.append(f"  {group:<10} = {', '.join(names)}")
    lines += ["", "Keys, with the values of this command:"]
    for key, field, value in settings(cfg):
        lines.append(f"  {f'{key}={as_typed(value)}':<34} {field.metadata['doc']}")
    return "\n".join(lines)


def _job(composed: DictConfig) -> float | None:
    """One job, in this process or in one of a launcher. Returns the validation score in a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from .sweep import run_job

    hydra: Any = HydraConfig.get()
    os.chdir(hydra.runtime.cwd)  # relative folders must not depend on hydra.job.chdir
    if hydra.mode == RunMode.MULTIRUN:
        return run_job(lambda: _train(composed, hydra, sweep=True), hydra)
    # Its SystemExit passes through Hydra, which would print other exceptions.
    run(PROGRAM, lambda: _train(composed, hydra, sweep=False))
    return None


def _train(composed: DictConfig, hydra: Any, sweep: bool) -> Any:
    from ..config.compose import job_config, job_overrides

    cfg = job_config(composed, hydra)
    if "torch" not in sys.modules:
        say(PROGRAM, "loading PyTorch ...")
    from ..record.folder import run_folder
    from ..training import train

    logging.basicConfig(format="%(message)s")
    logging.getLogger("indrnn").setLevel(logging.INFO)
    words = sys.argv[1:]
    if sweep:  # the command that repeats this job alone
        words = [] if hydra.job.config_name == "train" else ["--config-name", hydra.job.config_name]
        for source in hydra.runtime.config_sources:
            words += ["--config-dir", source.path] if source.provider == "command-line" else []
        words += job_overrides(hydra)
    result = train(cfg, command=shlex.join([PROGRAM, *words]))
    test = f"loss {result.test_loss:.4g}" if result.test_accuracy is None else f"accuracy {result.test_accuracy:.2%}"
    if leads():
        print(
            f"{result.name} seed {result.seed} on {result.task}: test {test} with the checkpoint of step "
            f"{result.best_step} of {result.steps}, {result.parameters:,} parameters; {run_folder(cfg)}",
            flush=True,
        )
    return result
