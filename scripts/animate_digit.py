#!/usr/bin/env python3
"""The animation at the top of README: a digit, read pixel by pixel, and the class probabilities of several networks.

    R=results/runs/mnist; python scripts/animate_digit.py $R/fast_indrnn-adam/seed0 $R/fast_lstm_chrono-adam/seed0

The digit is a test image. The runs are of one task with images, and their networks read from left to right.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter

from indrnn.data import make_task
from indrnn.report.runs import MODELS, model_name
from indrnn.report.style import figure, looks
from indrnn.training import load_run

STEP = 14  # pixels per frame: half a row
HOLD = 18  # frames at the end

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--index", type=int, default=7, help="of the test image")
    parser.add_argument("--data-root", default="data", help="where MNIST is")
    parser.add_argument("--out", type=Path, default=Path("results/figures/digit.gif"))
    options = parser.parse_args()
    loaded = [load_run(path) for path in options.runs]
    cfg = loaded[0][1]
    cfg.data.root = options.data_root
    task = make_task(cfg.data)
    x, y = task.load(torch.device("cpu")).test.batch(torch.tensor([options.index]))
    image, digit = task.picture(x[0]).numpy(), int(y[0])
    models = [model_name(run_cfg) for _, run_cfg in loaded]
    ends = [min(end, image.size) for end in range(STEP, image.size + STEP, STEP)]
    with torch.no_grad():
        probabilities = [[model(x[:, :end])[0].softmax(0).tolist() for end in ends] for model, _ in loaded]
    look = looks({model: model for model in models})
    columns = 1 + len(loaded)
    with figure(1, columns, width=2.5 * columns, height=2.6) as (drawing, (picture_axes, *panels)):
        pixels = np.full(image.size, np.nan)
        picture = picture_axes.imshow(pixels.reshape(image.shape), cmap="Greys", vmin=0, vmax=1)
        picture_axes.set(xticks=[], yticks=[], facecolor="#e8eef4")
        bars = []
        for axes, model in zip(panels, models, strict=True):
            bars.append(axes.barh(range(10), np.zeros(10), color=look[model]["color"]))
            axes.set(xlim=(0, 1), yticks=range(10), title=MODELS.get(model, model))
            axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
            axes.invert_yaxis()
            axes.get_yticklabels()[digit].set_fontweight("bold")

        def draw(frame: int) -> None:
            frame = min(frame, len(ends) - 1)
            read = ends[frame]
            pixels[:read] = image.ravel()[:read]
            picture.set_data(pixels.reshape(image.shape))
            picture_axes.set_title(f"pixel {read} of {image.size}")
            for group, values in zip(bars, probabilities, strict=True):
                for bar, value in zip(group, values[frame], strict=True):
                    bar.set_width(value)

        animation = FuncAnimation(drawing, draw, frames=len(ends) + HOLD)
        animation.save(options.out, writer=PillowWriter(fps=10), dpi=90)
    print(f"{options.out}: a {digit}; predictions {', '.join(str(int(np.argmax(p[-1]))) for p in probabilities)}")
