"""``indrnn-info``: what this installation can do: versions, devices, backends, data."""

from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from . import announce, command_parser, run

DESCRIPTION = """\
Print what a bug report, or a report of results, should include: versions, devices, CPU threads, which backends of the
recurrence work here and why the others do not, where the configuration is read from, and whether MNIST is there.
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
    """Exits with 2 and one line on stderr if the installation is damaged."""
    options = parser().parse_args(arguments)
    run("indrnn-info", lambda: _print_facts(options.data_root))


def _print_facts(data_root: str | None) -> None:
    announce("indrnn-info", "asking PyTorch and the backends")
    import torch

    from ..config.compose import config_dir
    from ..record.result import environment, git
    from ..recurrence import available_backends, resolve_backend

    cpu = environment("cpu")
    facts = [(name, str(value) if value else "none") for name, value in cpu["versions"].items()]
    source = git()
    if source["commit"]:
        facts.append(("commit", f"{source['commit']}{' with changes' if source['dirty'] else ''}"))
    facts += [("package", str(Path(__file__).resolve().parents[1])), ("configuration", str(config_dir()))]
    threads = cpu["num_threads"]
    facts.append(("cpu", f"{cpu['device_name']}, {cpu['instruction_set']}, {threads} thread{'s' * (threads > 1)}"))
    facts.append(("bfloat16 on cpu", _bfloat16()))
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            capability = f"compute capability {properties.major}.{properties.minor}"
            facts.append(
                (f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {capability}")
            )
    else:
        facts.append(("cuda device", "none"))
    if torch.backends.mps.is_available():
        devices.append("mps")
        facts.append(("mps device", "available"))
    for device in devices:
        for name, reason in available_backends(device).items():
            facts.append((f"{name} on {device}", "works" if reason is None else f"no: {reason}"))
        # On a GPU, resolving auto compiles and checks the kernels, and warns if they are wrong.
        facts.append((f"auto on {device}", resolve_backend("auto", device)))
    for name, value in [*facts, ("mnist", _mnist(data_root)), ("mnist5k", "bundled")]:
        print(f"{name + ':':<20} {value}")


def _bfloat16() -> str:
    """Whether trainer.precision=bfloat16 works on this CPU, and how much faster it makes a product of the default
    network: 784 steps of 32 sequences, 128 units."""
    import time

    import torch

    from ..training.device import bfloat16_refusal

    reason = bfloat16_refusal()
    if reason is not None:
        return f"no: {reason}"
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(784 * 32, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype)
        best = float("inf")
        for _ in range(5):
            start = time.perf_counter()
            x @ weight
            best = min(best, time.perf_counter() - start)
        seconds.append(best)
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
