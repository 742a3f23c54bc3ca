#!/usr/bin/env python3
"""The picture at the top of README: a digit, read pixel by pixel, and the class probabilities that networks give it.

    python scripts/animate_digit.py results/runs/mnist/fast_indrnn/seed0 results/runs/mnist/fast_lstm_chrono/seed0 \
        --label IndRNN --label "LSTM (chrono)" --index 7

The digit is a test image; RUN are run folders of one task, with networks that read from left to right.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from omegaconf import OmegaConf

from indrnn.data import make_task
from indrnn.report.inspection import class_probabilities
from indrnn.report.runs import model_name
from indrnn.report.style import SETTINGS, looks
from indrnn.training import load_run

STEP = 14  # pixels a frame: half a row
HOLD = 18  # frames at the end
FRAMES_A_SECOND = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--label", action="append", default=[], help="of a run, in their order (default: its name)")
    parser.add_argument("--index", type=int, default=0, help="of the test image")
    parser.add_argument("--data-root", help="where MNIST is, if not where the runs had it")
    parser.add_argument("--out", type=Path, default=Path("results/figures/digit.gif"))
    options = parser.parse_args()
    loaded = [load_run(path) for path in options.runs]
    cfg = loaded[0][1]
    if options.data_root:
        OmegaConf.update(cfg, "data.root", options.data_root)
    task = make_task(cfg.data)
    assert task.picture is not None, "the task's sequences are no images"
    x, y = task.load(torch.device("cpu")).test.batch(torch.tensor([options.index]))
    image, digit = task.picture(x[0]).numpy(), int(y[0])
    labels = options.label or [str(run_cfg.name) for _, run_cfg in loaded]
    beliefs = [class_probabilities(model.double(), x[0]).numpy() for model, _ in loaded]
    look = looks({label: model_name(run_cfg) for label, (_, run_cfg) in zip(labels, loaded, strict=True)})

    with matplotlib.rc_context(SETTINGS):
        drawing, axes = plt.subplots(
            1, 1 + len(loaded), figsize=(2.3 + 2.5 * len(loaded), 2.6), layout="constrained",
            width_ratios=[1.0, *[1.15] * len(loaded)],
        )  # fmt: skip
        shown = np.full(image.size, np.nan)
        picture = axes[0].imshow(shown.reshape(image.shape), cmap="Greys", vmin=0, vmax=1)
        axes[0].set_facecolor("#e8eef4")
        axes[0].set(xticks=[], yticks=[], title="pixel 0 of 784")
        axes[0].grid(visible=False)
        bars = []
        for place, label in zip(axes[1:], labels, strict=True):
            bars.append(place.barh(range(10), np.zeros(10), color=look[label]["color"]))
            place.set(xlim=(0, 1), yticks=range(10), xticks=(0, 0.5, 1), title=label)
            place.invert_yaxis()
            place.set_xticklabels(["0", "50 %", "100 %"])
            place.get_yticklabels()[digit].set_fontweight("bold")
            place.tick_params(labelsize=8)

        def draw(frame: int) -> None:
            read = min((frame + 1) * STEP, image.size)
            shown[:read] = image.ravel()[:read]
            picture.set_data(shown.reshape(image.shape))
            axes[0].set_title(f"pixel {read} of {image.size}")
            for group, belief in zip(bars, beliefs, strict=True):
                for bar, probability in zip(group, belief[read - 1], strict=True):
                    bar.set_width(probability)

        frames = image.size // STEP + HOLD
        animation = FuncAnimation(drawing, draw, frames=frames)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        animation.save(options.out, writer=PillowWriter(fps=FRAMES_A_SECOND), dpi=90)
        plt.close(drawing)
    answers = ", ".join(f"{label}: {belief[-1].argmax()}" for label, belief in zip(labels, beliefs, strict=True))
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB; a {digit}; final answers: {answers}")


if __name__ == "__main__":
    main()
