"""Compile every Triton kernel that is shipped, without a GPU, and write what each takes of one, as CSV:

    python scripts/triton_resources.py results/bench/triton_resources.csv --capability 80 90

Exits with 1 if a kernel spills registers, waits between the loads of a tile or changes its layout.
"""

import argparse
import csv
import sys
from pathlib import Path

import triton

from indrnn.recurrence.triton_gpu.compiled import compile_for, faults, resources, shipped


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the CSV file to write")
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], help="compute capabilities, 90 for 9.0")
    options = parser.parse_args()
    rows, bad = [], 0
    for variant in shipped():
        for capability in options.capability:
            compiled = compile_for(variant, capability)
            row = {
                "triton": triton.__version__,
                "capability": capability,
                "direction": variant.direction,
                "strategy": variant.tile.strategy,
                "chunks": variant.tile.chunks,
                "steps": variant.tile.steps,
                "threads": 32 * variant.tile.warps,
                "nonlinearity": variant.nonlinearity,
                "dtype": str(variant.dtype).removeprefix("torch."),
                "packed": variant.packed,
                "masked": variant.masked,
                **resources(compiled),
            }
            rows.append(row)
            for fault in faults(variant, compiled):
                bad += 1
                print(f"{fault}: {row}", file=sys.stderr)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{len(rows)} kernels, {bad} faults: {options.out}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
