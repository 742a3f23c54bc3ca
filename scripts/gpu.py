#!/usr/bin/env python3
"""Run everything that needs a GPU in at most nine minutes (`make gpu`, or `python scripts/gpu.py` without make).

Writes to $OUT (default: build/gpu): summary.txt, gpu.log with the output of all stages, and results.tar.gz with CSV
files, ratios, figures, a profile and a run. A stage that fails or exceeds its limit does not stop the next.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = "$PYTHON -m indrnn.cli.bench {} --device cuda --out ."
# Train until metrics.csv has five rows, send SIGTERM (exit code 128 + 15), and resume.
TRAIN = """
train() { exec $PYTHON -m indrnn model=indrnn data=mnist5k trainer.max_steps=300 trainer.log_every=1 \\
    trainer.cuda_graph=true device=cuda name=gpu output_root=runs; }
(train) & pid=$!; run=runs/mnist5k/gpu/seed0
until [ "$(cat $run/metrics.csv 2>/dev/null | wc -l)" -gt 5 ]; do kill -0 $pid || exit 1; sleep 0.02; done
kill $pid; wait $pid; [ $? = 143 ] && (train) && cat $run/result.json
"""
# Seconds and command of each stage: 540 s in all. The preflight compiles the kernels and checks them against the scan.
STAGES = {
    "preflight": (45, "nvidia-smi; $PYTHON -m indrnn.cli.info"),
    "train": (75, TRAIN),
    "step": (120, BENCH.format("step --profile --seconds 1")),
    "recurrence": (150, BENCH.format("recurrence --batch 32 1 512 --length 784 16384 --seconds 0.1")),
    "exact": (40, BENCH.format("exact")),
    "tests": (110, f"$PYTHON -m pytest -q -m gpu --continue-on-collection-errors {ROOT / 'tests'}"),
}


def run_stage(name: str, limit: float, command: str, folder: Path, log: Path) -> str:
    """Run a stage in ``folder``, append its output to ``log``, and return how it ended in one line."""
    start = time.monotonic()
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    with log.open("a") as file:
        print(f"== {name}", file=file, flush=True)
        # SIGKILL also ends every process that the stage started.
        ended = subprocess.run(
            ["timeout", "-s", "KILL", str(limit), "bash", "-c", command], stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, cwd=folder, env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": path},
        )  # fmt: skip
    code = ended.returncode
    end = "ok" if not code else f"stopped after {limit:g} s" if code == -signal.SIGKILL else f"exit code {code}"
    return f"{name:12}{end:22}{time.monotonic() - start:5.0f} s"


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("gpu.py: PyTorch finds no CUDA GPU here; on a CPU use indrnn-bench and make test", file=sys.stderr)
        return 2
    out = Path(os.environ.get("OUT") or ROOT / "build" / "gpu").resolve()
    results, log = out / "results", out / "gpu.log"
    shutil.rmtree(results, ignore_errors=True)
    results.mkdir(parents=True)
    log.unlink(missing_ok=True)
    ends = []
    for name, (limit, command) in STAGES.items():
        ends.append(run_stage(name, limit, command, results, log))
        print(ends[-1], flush=True)
        (out / "summary.txt").write_text("\n".join(ends) + "\n")
    shutil.make_archive(str(results), "gztar", out, "results")
    print(f"wrote {log}, summary.txt and results.tar.gz")
    return 0 if all(" ok " in end for end in ends) else 1


if __name__ == "__main__":
    sys.exit(main())
