"""Everything that needs a GPU, within about ten minutes and into one folder:

    python scripts/gpu_session.py OUT                 all of it
    python scripts/gpu_session.py OUT tests exact     some of it, where one command may not take ten minutes

tests: `pytest -m gpu`; exact: every backend and dtype against float64; step: training steps a second and profiler
tables; recurrence: the grid of sizes, CSV and figure. Each leaves its output in OUT/<name>.log. What fails does not
stop the rest; a short table comes last, and the exit code is 1 if anything failed.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCH = ("-m", "indrnn.cli.bench")
# Seconds after which a part is stopped: together ten minutes.
LIMITS = {"tests": 150, "exact": 60, "step": 150, "recurrence": 240}


def command(part: str, out: Path) -> list[str]:
    """The command line of one part."""
    if part == "tests":
        return [sys.executable, "-m", "pytest", "-m", "gpu", str(ROOT / "tests")]
    to_folder = ["--device", "cuda", "--out", str(out)]
    # Less than the limit, which also has to allow for checking the backends and drawing the figure.
    budget = ["--minutes", "3"] if part == "recurrence" else []
    return [sys.executable, *BENCH, part, *to_folder, *budget]


def run(part: str, out: Path) -> tuple[str, float]:
    """Run one part, its output into a log; returns how it ended, and the seconds it took."""
    start = time.monotonic()
    with (out / f"{part}.log").open("w") as log:
        try:
            # Without stdin a command that waits for an answer ends at once, not at the limit.
            code = subprocess.run(
                command(part, out), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                timeout=LIMITS[part], cwd=ROOT, check=False,
            ).returncode  # fmt: skip
            ended = "ok" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {LIMITS[part]} s"
    return ended, time.monotonic() - start


def summary(ends: dict[str, tuple[str, float]], out: Path) -> str:
    """How each part ended, the last line and the warnings of each log, and every table."""
    lines = []
    for part, (ended, seconds) in ends.items():
        log = (out / f"{part}.log").read_text(errors="replace").strip().splitlines() or ["no output"]
        lines.append(f"{part:12}{ended:24}{seconds:6.0f} s   {log[-1]}")
        # A kernel or a graph was replaced by something slower: the part has not failed, but its figures mean less.
        lines += [f"{'':12}{line}" for line in log if "UserWarning: " in line]
    tables = [path.read_text() for path in sorted(out.glob("*.md"))]
    return "\n\n".join(["\n".join(lines), *tables])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("parts", nargs="*", metavar="part", help=f"which parts: {', '.join(LIMITS)} (default: all)")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in LIMITS]
    if unknown:
        parser.error(f"there is no part {unknown[0]}; choose from {', '.join(LIMITS)}")
    import torch

    if not torch.cuda.is_available():
        parser.error("no CUDA GPU was found here; on a CPU, use indrnn-bench")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    ends = {}
    for part in options.parts or LIMITS:
        print(f"{part} ...", flush=True)
        ends[part] = run(part, out)
    text = summary(ends, out)
    (out / "summary.txt").write_text(text)
    print(text)
    return 0 if all(ended == "ok" for ended, _ in ends.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
