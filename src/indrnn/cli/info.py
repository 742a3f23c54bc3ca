"""``indrnn-info``: versions, devices, backends and data of this installation."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from . import command_parser, run, say

DESCRIPTION = """\
Print what a bug report should include: versions, devices, CPU threads, available backends of the recurrence and the
reasons why others are not, the folder of the configuration, and whether MNIST is present.
"""


def parser() -> ArgumentParser:
    command = command_parser("indrnn-info", DESCRIPTION)
    command.add_argument(
        "--data-root",
        metavar="FOLDER",
        help="where to look for MNIST (default: data.root, that is INDRNN_DATA from the environment, or data)",
    )
    return command


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    run("indrnn-info", lambda: _print_facts(options.data_root))


def _print_facts(data_root: str | None) -> None:
    say("indrnn-info", "loading PyTorch and checking the backends ...")
    import torch

    from ..config.compose import CONFIG_DIR
    from ..record.result import environment, git
    from ..recurrence import available_backends, resolve_backend

    cpu, source, devices = environment("cpu"), git(), ["cpu"]
    facts = {name: str(value) if value else "none" for name, value in cpu["versions"].items()}
    if source["commit"]:
        facts["commit"] = f"{source['commit']}{' with changes' if source['dirty'] else ''}"
    facts["package"], facts["configuration"] = str(Path(__file__).resolve().parents[1]), str(CONFIG_DIR)
    facts["cpu"] = f"{cpu['device_name']}, {cpu['instruction_set']}, {cpu['num_threads']} threads"
    facts["bfloat16 on cpu"] = _bfloat16()
    if torch.cuda.is_available():
        devices.append("cuda")
    else:
        facts["cuda device"] = "none"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory, capability = f"{gpu.total_memory / 2**30:.0f} GiB", f"compute capability {gpu.major}.{gpu.minor}"
        facts[f"cuda:{index}"] = f"{gpu.name}, {memory}, {capability}"
    if torch.backends.mps.is_available():
        devices.append("mps")
        facts["mps device"] = "available"
    for device in devices:
        for name, reason in available_backends(device).items():
            facts[f"{name} on {device}"] = "works" if reason is None else f"no: {reason}"
        # On a GPU, resolving auto compiles and checks the kernels, and warns if they are wrong.
        facts[f"auto on {device}"] = resolve_backend("auto", device)
    facts["mnist"], facts["mnist5k"] = _mnist(data_root), "bundled"
    for name, value in facts.items():
        print(f"{name + ':':<20} {value}")


def _bfloat16() -> str:
    """Whether trainer.precision=bfloat16 works on this CPU, and its speedup of the default network's products."""
    import torch
    from torch.utils.benchmark import Timer

    from ..training.device import bfloat16_refusal

    reason = bfloat16_refusal()
    if reason is not None:
        return f"no: {reason}"
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        operands = {"x": torch.ones(784 * 32, 128, dtype=dtype), "weight": torch.ones(128, 128, dtype=dtype)}
        seconds.append(Timer("x @ weight", globals=operands, num_threads=torch.get_num_threads()).timeit(5).median)
    return f"works: the products between layers are {seconds[0] / seconds[1]:.1f} times as fast as in float32"


def _mnist(root: str | None) -> str:
    from ..config.compose import load_config
    from ..config.schema import MNISTConfig
    from ..data.download import missing_files, raw_folder

    if root is None:
        root = cast(MNISTConfig, load_config(["data=mnist"]).data).root
    folder = raw_folder(root)
    if not missing_files(folder):
        return f"found in {folder}"
    return f"not in {folder}; indrnn-train downloads it, data.root= or INDRNN_DATA names another folder"
