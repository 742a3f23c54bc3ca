"""Measure the recurrence, a layer and the default training step on this machine, into results/bench/.

    python scripts/bench_recurrence.py --quick      a few sizes: about two minutes on two CPU cores
    python scripts/bench_recurrence.py              the full grid: up to half an hour

It is `indrnn-bench` by another name and takes its options.
"""

from indrnn.cli.bench import main

if __name__ == "__main__":
    main()
