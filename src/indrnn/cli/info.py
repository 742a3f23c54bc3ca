"""``indrnn-info``: versions, devices, backends and data of this installation."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from . import run, say

DESCRIPTION = """\
Print what a bug report should include: versions, devices, CPU threads, available backends of the recurrence and the
reasons why others are not, the folder of the configuration, and whether MNIST is present.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser("indrnn-info", description=DESCRIPTION)
    parser.add_argument("--data-root", metavar="FOLDER", help="where to look for MNIST (default: data.root)")
    options = parser.parse_args(arguments)
    run("indrnn-info", lambda: _print_facts(options.data_root))


def _print_facts(data_root: str | None) -> None:
    say("indrnn-info", "loading PyTorch and checking the backends ...")
    for name, value in _facts(data_root):
        print(f"{name + ':':<20} {value or 'none'}")


def _facts(data_root: str | None) -> Iterator[tuple[str, Any]]:
    import torch

    from ..config.compose import CONFIG_DIR, load_config
    from ..data.download import missing_files, raw_folder
    from ..record.result import environment, git
    from ..recurrence import available_backends, resolve_backend
    from ..training.device import bfloat16_refusal

    cpu, source = environment("cpu"), git()
    yield from cpu["versions"].items()
    yield "commit", source["commit"] and f"{source['commit']}{' with changes' if source['dirty'] else ''}"
    yield "package", Path(__file__).resolve().parents[1]
    yield "configuration", CONFIG_DIR
    yield "cpu", f"{cpu['device_name']}, {cpu['instruction_set']}, {cpu['num_threads']} threads"
    yield "bfloat16 on cpu", bfloat16_refusal() or "works"
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory, capability = f"{gpu.total_memory / 2**30:.0f} GiB", f"compute capability {gpu.major}.{gpu.minor}"
        yield f"cuda:{index}", f"{gpu.name}, {memory}, {capability}"
    others = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    devices = ["cpu", *(device for device, available in others.items() if available)]
    yield "devices", ", ".join(devices)
    for device in devices:
        for name, reason in available_backends(device).items():
            yield f"{name} on {device}", "works" if reason is None else f"no: {reason}"
        yield f"auto on {device}", resolve_backend("auto", device)
    data: Any = load_config(["data=mnist"]).data
    folder = raw_folder(data_root or data.root)
    yield "mnist", f"{'not in' if missing_files(folder) else 'found in'} {folder}"


if __name__ == "__main__":
    main()
