"""The playground (`indrnn-report --playground`): a page on which trained networks read a digit pixel by pixel."""

import base64
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from indrnn.data import make_task
from indrnn.errors import UserError
from indrnn.files import write_atomically
from indrnn.layers import recurrent_layers
from indrnn.models.baselines import LSTMClassifier
from indrnn.models.indrnn import PlainIndRNN
from indrnn.record.result import read_result
from indrnn.training import load_run

from .runs import MODELS, model_name


@torch.no_grad()
def write_playground(paths: list[Path], out: Path, data_root: str | None = None) -> None:
    """Write the page ``out`` from finished runs of one task. Raises UserError for a run that it does not support."""
    runs: list[Any] = [(path, *load_run(path), read_result(path / "result.json")) for path in paths]
    data = runs[0][2].data
    task: Any = make_task(data)
    for path, model, cfg, _ in runs:
        relu = type(model) in (PlainIndRNN, LSTMClassifier) and getattr(cfg.model, "nonlinearity", "relu") == "relu"
        if not relu or not task.picture or hasattr(cfg.data, "_target_") or make_task(cfg.data).folder != task.folder:
            raise UserError(f"{path}: --playground supports indrnn with relu and lstm, all runs on one MNIST task")
    if data_root is not None and hasattr(data, "root"):
        data.root = data_root
    test = make_task(data).load(torch.device("cpu")).test
    x, y = test.batch(torch.arange(test.size or 0))
    row, column = torch.arange(-14.0, 14).view(28, 1), torch.arange(-14.0, 14)
    drawn = (1.6 - 7 * (torch.hypot(row / 9, column / 6) - 1).abs()).clamp(0, 1)  # an ellipse for the self-test
    chosen = [task.picture(x[y == digit][place]) for place in (0, -1) for digit in range(10)]
    pixels = (255 * torch.stack([*chosen, drawn])).round().flatten(1)
    order = task.picture(torch.linspace(-1, 1, task.length).unsqueeze(1)).flatten().argsort()
    x = ((pixels - 127.5) * 2 / 255)[:, order].unsqueeze(2)
    networks = [_network(*run) | {"probabilities": run[0](x).softmax(1).tolist()} for _, *run in runs]
    page = {"task": f"{task.title}. {task.caveat or ''}", "order": order.tolist(), "images": [*pixels.byte()]}
    text = json.dumps(page | {"networks": networks}, default=_encoded).replace("<", "\\u003c")
    write_atomically(out, Path(__file__).with_suffix(".html").read_text(encoding="utf-8").replace("__DATA__", text))


def _network(model: Any, cfg: Any, result: Any) -> dict[str, Any]:
    """What the page shows of a network, and its weights, with batch norm as scale and shift."""
    lstm = model.lstm.all_weights if type(model) is LSTMClassifier else []
    layers: list[Any] = [{"weight": weight, "recurrent": matrix, "bias": b + c} for weight, matrix, b, c in lstm]
    for _, layer in recurrent_layers(model):
        layer.backend = "auto"
        norm: Any = layer.norm or nn.BatchNorm1d(layer.hidden_size, eps=0)  # the identity
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weights = {"weight": layer.weight_ih, "bias": layer.bias, "u": layer.recurrent_weight()}
        layers.append(weights | {"scale": scale, "shift": norm.bias - norm.running_mean * scale})
    about = f"{cfg.model.num_layers} × {cfg.model.hidden_size} units, {result.parameters:,} parameters, "
    about += f"{100 * result.test_accuracy:.2f} % test accuracy ({result.task}, {result.name}, seed {result.seed})"
    label = MODELS.get(model_name(cfg), result.model)
    return {"label": label, "about": about, "layers": layers, "head": model.head.state_dict()}


def _encoded(tensor: Tensor) -> dict[str, Any]:
    """Base64, large matrices as int16 with a scale per row: as small as float16 and several times as precise."""
    if tensor.is_floating_point() and tensor.numel() > 4096:
        scale = tensor.abs().amax(1).clamp(min=1e-30) / 32767
        return {"rows": (tensor / scale.unsqueeze(1)).round().short(), "scale": scale}
    values = tensor.detach().numpy()
    return {"dtype": str(values.dtype), "base64": base64.b64encode(values.tobytes()).decode()}
