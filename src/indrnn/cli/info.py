"""``indrnn-info``: versions, devices, backends and data of this installation."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import run, say

DESCRIPTION = """\
Print what a bug report should include: versions, devices, CPU threads, available backends of the recurrence and the
reasons why others are not, the folder of the configuration, and whether MNIST is in data/ or the folder INDRNN_DATA.
"""


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser("indrnn-info", description=DESCRIPTION).parse_args(arguments)
    run("indrnn-info", _print_facts)


def _print_facts() -> None:
    say("indrnn-info", "loading PyTorch and checking the backends ...")
    import torch

    from ..config.compose import CONFIG_DIR, load_config
    from ..data.download import missing_files, raw_folder
    from ..record.result import environment, git
    from ..recurrence import available_backends, resolve_backend
    from ..training.device import bfloat16_refusal

    cpu, source = environment("cpu"), git()
    facts: dict[str, Any] = {
        **cpu["versions"],
        "commit": source["commit"] and f"{source['commit']}{' with changes' if source['dirty'] else ''}",
        "package": Path(__file__).resolve().parents[1],
        "configuration": CONFIG_DIR,
        "cpu": f"{cpu['device_name']}, {cpu['instruction_set']}, {cpu['num_threads']} threads",
        "bfloat16 on cpu": bfloat16_refusal() or "works",
    }
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        memory, capability = f"{gpu.total_memory / 2**30:.0f} GiB", f"compute capability {gpu.major}.{gpu.minor}"
        facts[f"cuda:{index}"] = f"{gpu.name}, {memory}, {capability}"
    others = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    for device in ["cpu", *(device for device, available in others.items() if available)]:
        for name, reason in available_backends(device).items():
            facts[f"{name} on {device}"] = "works" if reason is None else f"no: {reason}"
        facts[f"auto on {device}"] = resolve_backend("auto", device)
    data: Any = load_config(["data=mnist"]).data
    folder = raw_folder(data.root)
    facts["mnist"] = f"{'not in' if missing_files(folder) else 'found in'} {folder}"
    for name, value in facts.items():
        print(f"{name + ':':<20} {value or 'none'}")


if __name__ == "__main__":
    main()
