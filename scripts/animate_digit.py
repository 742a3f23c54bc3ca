#!/usr/bin/env python3
"""The animation at the top of README: a digit, read pixel by pixel, and the class probabilities of several networks.

    R=results/runs/mnist; python scripts/animate_digit.py data $R/fast_indrnn/seed0 $R/fast_lstm_chrono/seed0

The first argument is the folder that has MNIST. The networks read from left to right. Writes results/figures/digit.gif.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.animation import FuncAnimation, PillowWriter

from indrnn.data import make_task
from indrnn.report.runs import MODELS, model_name
from indrnn.report.style import figure, looks
from indrnn.training import load_run

INDEX = 7  # of the test image
STEP = 14  # pixels per frame: half a row
HOLD = 18  # frames at the end
OUT = Path(__file__).resolve().parents[1] / "results" / "figures" / "digit.gif"

if __name__ == "__main__":
    loaded = [load_run(Path(path)) for path in sys.argv[2:]]
    cfg = loaded[0][1]
    cfg.data.root = sys.argv[1]
    task = make_task(cfg.data)
    x, y = task.load(torch.device("cpu")).test.batch(torch.tensor([INDEX]))
    image, models = task.picture(x[0]).numpy(), [model_name(run_cfg) for _, run_cfg in loaded]
    ends = range(STEP, image.size + 1, STEP)
    with torch.no_grad():
        probabilities = [[model(x[:, :end])[0].softmax(0).tolist() for end in ends] for model, _ in loaded]
    look = looks({model: model for model in models})
    columns = 1 + len(loaded)
    with figure(1, columns, width=2.5 * columns, height=2.6) as (drawing, (picture, *panels)):

        def draw(frame: int) -> None:
            frame = min(frame, len(ends) - 1)
            read = np.where(np.arange(image.size) < ends[frame], image.ravel(), np.nan)
            for axes in (picture, *panels):
                axes.clear()
            picture.imshow(read.reshape(image.shape), cmap="Greys", vmin=0, vmax=1)
            picture.set(xticks=[], yticks=[], facecolor="#e8eef4", title=f"pixel {ends[frame]} of {image.size}")
            for axes, model, shares in zip(panels, models, probabilities, strict=True):
                axes.barh(range(10), shares[frame], color=look[model]["color"])
                axes.set(xlim=(0, 1), ylim=(9.5, -0.5), yticks=range(10), title=MODELS.get(model, model))
                axes.set_xticks([0, 0.5, 1], ["0", "50 %", "100 %"])
                axes.get_yticklabels()[int(y)].set_fontweight("bold")

        FuncAnimation(drawing, draw, frames=len(ends) + HOLD).save(OUT, writer=PillowWriter(fps=10), dpi=90)
    print(f"wrote {OUT}")
