"""What a composed configuration must satisfy: the ranges of the schema, and what keys require of each other."""

import math
import re
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError
from .schema import FOLDER_NAME, Config

if TYPE_CHECKING:
    from ..data import Task

_TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
# Where the schema has no maximum; beyond it int32 indices, and any patience, end.
_LARGEST_INTEGER = 2**31 - 1


def check(cfg: Config) -> None:
    """Check every value against the schema's ranges and choices, then against the other values.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    for key, setting, value in settings(cfg):
        # What a network or a task from outside takes is its own affair.
        if setting.name != "args":
            _check_range(key, value, setting.metadata)
    run_name(cfg)
    if not cfg.output_root:
        raise UserError("output_root='': it names a folder; give one, or . for this one")
    if getattr(cfg.data, "root", ".") == "":
        raise UserError("data.root='': it names a folder; give one, or . for this one")
    _check_data(cfg)
    _check_training(cfg)
    _check_model(cfg)


def run_name(cfg: Config) -> str:
    """What a run is called, in its folder's path and in reports: its name, with its tag if it has one.

    Raises:
        UserError: one of the two cannot be part of a folder's name.
    """
    name, tag = cfg.name, getattr(cfg, "tag", None)
    for key, value in (("name", name), ("tag", tag)):
        if value is not None and not re.fullmatch(FOLDER_NAME, value):
            raise UserError(
                f"{key}={value!r}: it names a folder; use letters, digits and _ - + = , @ % and, but not first, a dot"
            )
    return name if tag is None else f"{name}-{tag}"


def result_keys(cfg: Config) -> dict[str, Any]:
    """The keys whose values can change what a run computes, dotted, with plain values."""
    return {key: value for key, setting, value in settings(cfg) if setting.metadata.get("affects_result", True)}


def settings(cfg: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Every key of a structured configuration: its dotted name, its field in the schema, its resolved value.

    Raises:
        UserError: a value is missing or refers to something that does not exist.
    """
    schema = OmegaConf.get_type(cfg)
    if schema is None or not is_dataclass(schema):
        raise UserError(f"{prefix.rstrip('.') or 'the configuration'}: not composed from the schema in indrnn.config")
    for field in fields(schema):
        key = f"{prefix}{field.name}"
        if OmegaConf.is_missing(cfg, field.name):
            raise UserError(f"{key}: it has no value; set {key}=...")
        try:
            value = cfg[field.name]
        except OmegaConfBaseException as error:
            raise UserError(f"{key}={cfg._get_node(field.name)}: {type_problem(str(error))}") from error
        if isinstance(value, DictConfig) and OmegaConf.get_type(value) is dict:
            yield from ((name, field, argument) for name, argument in _arguments(value, f"{key}."))
        elif isinstance(value, DictConfig):
            yield from settings(value, f"{key}.")
        elif isinstance(value, ListConfig):
            yield key, field, list(value)
        else:
            yield key, field, value


def _arguments(args: DictConfig, prefix: str) -> Iterator[tuple[str, Any]]:
    """The dotted names and plain values of ``args``, which has no schema."""
    for name in map(str, args):
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(args, name):
            raise UserError(f"{key}: it has no value; set {key}=...")
        try:
            value = args[name]
        except OmegaConfBaseException as error:
            raise UserError(f"{key}={args._get_node(name)}: {type_problem(str(error))}") from error
        if isinstance(value, DictConfig):
            yield from _arguments(value, f"{key}.")
        else:
            yield key, OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value


def _check_range(key: str, value: Any, limits: Any) -> None:
    if isinstance(value, list):
        if not value:
            raise UserError(f"{key}=[]: the list is empty; give at least one value")
        for element in value:
            _check_range(key, element, limits)
        return
    choices = limits.get("choices")
    if choices is not None and value not in choices:
        words = (str(choice).lower() if isinstance(choice, bool) else choice for choice in choices)
        raise UserError(f"{key}={value}: choose one of {', '.join(words)}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    low, above = limits.get("minimum"), limits.get("above")
    high, below = limits.get("maximum"), limits.get("below")
    if isinstance(value, int):
        high = _LARGEST_INTEGER if high is None else high
    elif not math.isfinite(value):
        raise UserError(f"{key}={value}: it must be a finite number")
    inside = (
        (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )
    if not inside:
        raise UserError(f"{key}={value}: it must be {_range_in_words(low, above, high, below)}")


def _range_in_words(low: float | None, above: float | None, high: float | None, below: float | None) -> str:
    words = [
        f"{relation} {limit:,}"
        for relation, limit in (("at least", low), ("above", above), ("at most", high), ("below", below))
        if limit is not None
    ]
    return " and ".join(words)


def least_memory(cfg: Config) -> int:
    """Bytes that training or evaluating the network cannot do without: each layer's output for a whole batch (while
    evaluating, that of one layer and its input), and four numbers for each recurrent or square weight."""
    model: Any = cfg.model
    trainer = cfg.trainer
    if "_target_" in model:
        return 0  # Nothing is known of it.
    size = int(model.hidden_size)
    if "growth" in model:
        bottleneck = model.bottleneck * model.growth
        outputs = size + sum(model.block_layers) * (bottleneck + model.growth)
        weights = sum(model.block_layers) * bottleneck * model.growth
    else:
        layers = model.num_layers if "num_layers" in model else 2 * model.num_blocks + 1
        outputs = layers * size
        inner = layers - 1
        matrices = {"LSTMConfig": 4 * (layers + inner), "RNNConfig": layers + inner}
        weights = matrices.get(getattr(OmegaConf.get_type(model), "__name__", ""), inner) * size**2
    sequences: int = getattr(cfg.data, "validation_size", trainer.eval_batch_size)
    states = max(trainer.batch_size * outputs, 2 * min(trainer.eval_batch_size, sequences) * size)
    return 4 * _task(cfg).length * states + 16 * weights


def _task(cfg: Config) -> "Task":
    # Here, so that --help does not wait for what reading data takes.
    from ..data import make_task

    return make_task(cfg.data)


def _check_data(cfg: Config) -> None:
    count = _task(cfg).training_samples
    if count is None:
        return
    for key in ("batch_size", "bn_samples"):
        value = getattr(cfg.trainer, key)
        if value > count:
            raise UserError(f"trainer.{key}={value}: there are only {count:,} training samples; take at most as many")


def _check_training(cfg: Config) -> None:
    minimum = getattr(cfg.schedule, "minimum_lr", 0.0)
    if minimum >= cfg.optimizer.lr:
        raise UserError(
            f"schedule.minimum_lr={minimum}: the run would end at once; "
            f"it must be below optimizer.lr={cfg.optimizer.lr}"
        )


def _check_model(cfg: Config) -> None:
    model: Any = cfg.model
    fixed = getattr(model, "last_layer_fixed", None)
    if fixed is None or model.constraint == "none":
        return
    # Here, for it imports PyTorch.
    from ..layers import recurrent_max

    length = _task(cfg).length
    bound = recurrent_max(length, model.gamma)
    if abs(fixed) > bound:
        raise UserError(
            f"model.last_layer_fixed={fixed}: it must be at most {bound:.6g} in size, which is model.gamma^(1/{length})"
        )


def type_problem(text: str) -> str:
    """``Value 'x' of type 'str' could not be converted to Float`` and its like, in words."""
    first = text.strip().splitlines()[0] if text.strip() else "not a possible value"
    first = re.sub(r"^While dereferencing interpolation '.*?': ", "", first)
    wrong = re.match(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", first)
    if wrong:
        # A reference to a whole group would print all of it.
        value = "a group of keys" if wrong[2] == "DictConfig" else wrong[1]
        return f"{value} is not {_TYPE_NAMES.get(wrong[3], wrong[3])}"
    if "is not Optional" in first:
        return "it must have a value, not null"
    if "is not a ListConfig" in first:
        return "a list is needed, as [1,2]"
    if first.startswith("Cannot convert"):
        return "a text is needed"
    return first
