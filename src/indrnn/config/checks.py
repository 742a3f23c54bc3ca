"""Checks of a composed configuration: the ranges of the schema, and conditions that several keys must meet."""

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields, is_dataclass
from typing import Any, cast

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError
from .schema import FOLDER_NAME, FOLDER_NAME_RULE, Config, IndRNNBaseConfig

_TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}
# The limit of int32 indices, if the schema has no maximum.
_LARGEST_INTEGER = 2**31 - 1


def check(cfg: Config) -> None:
    """Check every value against the schema's ranges and choices, then against the other values.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    for key, setting, value in settings(cfg):
        # A network or task from outside checks its own arguments.
        if setting.name != "args":
            _check_range(key, value, setting.metadata)
    _check_together(cfg)


def run_name(cfg: Config) -> str:
    """The name of a run in the path of its folder and in reports: cfg.name, with cfg.tag if there is one.

    Raises:
        UserError: one of the two cannot be part of a folder's name.
    """
    name, tag = cfg.name, getattr(cfg, "tag", None)
    for key, value in (("name", name), ("tag", tag)):
        if value is not None and not re.fullmatch(FOLDER_NAME, value):
            raise UserError(f"{key}={value!r}: it names a folder; {FOLDER_NAME_RULE}")
    return name if tag is None else f"{name}-{tag}"


def result_keys(cfg: Config) -> dict[str, Any]:
    """The keys whose values can change what a run computes, dotted, with plain values."""
    return {key: value for key, setting, value in settings(cfg) if setting.metadata.get("affects_result", True)}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"model": {"name": "lstm"}}`` -> ``{"model.name": "lstm"}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def settings(cfg: Any, prefix: str = "", parent: Field[Any] | None = None) -> Iterator[tuple[str, Field[Any], Any]]:
    """Every key of a structured configuration: its dotted name, its field in the schema, its resolved value. Keys below
    ``args``, which has no schema, come with the field of ``args``.

    Raises:
        UserError: a value is missing or refers to something that does not exist.
    """
    schema = OmegaConf.get_type(cfg)
    if schema is not None and is_dataclass(schema):
        own = {field.name: field for field in fields(schema)}
    elif parent is not None:
        own = dict.fromkeys(map(str, cfg), parent)
    else:
        raise UserError("the configuration is not composed from the schema in indrnn.config")
    for name, field in own.items():
        key = f"{prefix}{name}"
        if OmegaConf.is_missing(cfg, name):
            raise UserError(f"{key}: it has no value; set {key}=...")
        try:
            value = cfg[name]
        except OmegaConfBaseException as error:
            raise UserError(f"{key}={cfg._get_node(name)}: {type_problem(str(error))}") from error
        if isinstance(value, DictConfig):
            yield from settings(value, f"{key}.", field)
        else:
            yield key, field, OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value


def _check_range(key: str, value: object, limits: Mapping[str, Any]) -> None:
    if isinstance(value, list):
        if not value:
            raise UserError(f"{key}=[]: the list is empty; give at least one value")
        for element in value:
            _check_range(key, element, limits)
        return
    choices = limits.get("choices")
    if choices is not None and value not in choices:
        raise UserError(f"{key}={value}: choose one of {', '.join(map(as_typed, choices))}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: it must be a finite number")
    high = limits.get("maximum")
    bounds: list[tuple[str, Any, Callable[[Any, Any], bool]]] = [
        ("at least", limits.get("minimum"), operator.ge),
        ("above", limits.get("above"), operator.gt),
        ("at most", _LARGEST_INTEGER if high is None and isinstance(value, int) else high, operator.le),
        ("below", limits.get("below"), operator.lt),
    ]
    bounds = [bound for bound in bounds if bound[1] is not None]
    if not all(holds(value, limit) for _, limit, holds in bounds):
        allowed = " and ".join(f"{words} {limit:,}" for words, limit, _ in bounds)
        raise UserError(f"{key}={value}: it must be {allowed}")


def _check_together(cfg: Config) -> None:
    """Conditions that several keys must meet."""
    # Imported here, because --help must not wait for NumPy.
    from ..data import make_task

    for key, folder in (("output_root", cfg.output_root), ("data.root", getattr(cfg.data, "root", None))):
        if folder == "":
            raise UserError(f"{key}='': it names a folder; give one, or . for this one")
    run_name(cfg)
    task = make_task(cfg.data)
    count = task.training_samples
    for key in ("batch_size", "bn_samples"):
        value = getattr(cfg.trainer, key)
        if count is not None and value > count:
            raise UserError(f"trainer.{key}={value}: there are only {count:,} training samples; use at most that many")
    minimum = getattr(cfg.schedule, "minimum_lr", 0.0)
    if minimum >= cfg.optimizer.lr:
        raise UserError(
            f"schedule.minimum_lr={minimum}: the run would end at once; "
            f"it must be below optimizer.lr={cfg.optimizer.lr}"
        )
    fixed = getattr(cfg.model, "last_layer_fixed", None)
    if fixed is None:
        return
    from ..layers import recurrent_max  # only if it is needed, because it imports PyTorch

    model = cast(IndRNNBaseConfig, cfg.model)
    bound = recurrent_max(task.length, model.gamma)
    if model.constraint != "none" and abs(fixed) > bound:
        raise UserError(
            f"model.last_layer_fixed={fixed}: it must be at most {bound:.6g} in size, "
            f"which is model.gamma^(1/{task.length})"
        )


def as_typed(value: object) -> str:
    """A value as it would be typed on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def type_problem(text: str) -> str:
    """OmegaConf's messages (``Value 'x' of type 'str' could not be converted to Float``) in plain words."""
    first = text.strip().splitlines()[0] if text.strip() else "not a possible value"
    first = re.sub(r"^While dereferencing interpolation '.*?': ", "", first)
    wrong = re.match(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", first)
    if wrong:
        # For a reference to a group, the value would be the whole group.
        value = "a group of keys" if wrong[2] == "DictConfig" else wrong[1]
        return f"{value} is not {_TYPE_NAMES.get(wrong[3], wrong[3])}"
    if "is not Optional" in first:
        return "it must have a value, not null"
    if "is not a ListConfig" in first:
        return "a list is needed, as [1,2]"
    if first.startswith("Cannot convert"):
        return "a text is needed"
    return first
