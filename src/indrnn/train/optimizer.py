"""Adam with parameter groups chosen by module, its learning rate a tensor so that a captured step can read it."""

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..layers import recurrent_layers

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def decayed_parameters(model: nn.Module) -> list[Tensor]:
    """The parameters that weight decay applies to: all but u and biases, as in the paper's code. Weights of linear
    layers, input weights of IndRNN layers, input and recurrent matrices of LSTM and RNN, scales of normalisations."""
    weights: list[Tensor] = [layer.weight_ih for _, layer in recurrent_layers(model) if layer.weight_ih is not None]
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.BatchNorm1d | nn.LayerNorm) and module.weight is not None:
            weights.append(module.weight)
        elif isinstance(module, nn.RNNBase):
            weights += [weight for layer in module.all_weights for weight in layer if weight.dim() == 2]
    # A weight that two modules share counts once.
    return list(dict.fromkeys(weights))


def build_optimizer(model: nn.Module, cfg: Any, device: torch.device) -> torch.optim.Optimizer:
    """``cfg`` is cfg.optimizer. Weight decay is added to the gradient (adam) or applied to the weight (adamw).

    All groups share one learning-rate tensor, to be changed in place (`rate_tensor`). Raises UserError for an unknown
    name.
    """
    if cfg.name not in OPTIMIZERS:
        raise UserError(f"optimizer.name={cfg.name} is unknown; choose from {', '.join(OPTIMIZERS)}")
    decayed = decayed_parameters(model)
    ids = {id(parameter) for parameter in decayed}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    rate = torch.tensor(cfg.lr, dtype=torch.float32, device=device)
    groups = [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for parameters, decay in ((decayed, cfg.weight_decay), (others, 0.0))
        if parameters
    ]
    return OPTIMIZERS[cfg.name](
        groups,
        lr=cfg.lr,
        betas=(cfg.beta1, cfg.beta2),
        eps=cfg.eps,
        # One kernel for all parameters; it also leaves everything as it is while `found_inf` is 1 (see TrainingStep).
        fused=True,
        capturable=device.type == "cuda",
    )


def rate_tensor(optimizer: torch.optim.Optimizer) -> Tensor:
    """The learning rate that every group reads."""
    return optimizer.param_groups[0]["lr"]
