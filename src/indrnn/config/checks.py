"""Checks of a composed configuration: unknown keys, the ranges of the schema, and conditions on several keys."""

import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import Field, is_dataclass
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from ..errors import UserError
from .schema import FOLDER_NAME, FOLDER_NAME_RULE, SCHEMAS, Config, all_keys

_BOUNDS = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}
# The limit of int32 indices, for integers without a maximum.
_LARGEST_INTEGER = 2**31 - 1


def check(cfg: Config) -> None:
    """Check every key and value against the schema, then the values against each other.

    Raises:
        UserError: one line with the key, its value and what is allowed.
    """
    for key, field, value in settings(cfg):
        # Custom models, tasks and optimizers check their own arguments.
        if field.name != "args":
            _check_range(key, value, field.metadata)
    _check_together(cfg)


def run_name(cfg: Config) -> str:
    """The name of a run in the path of its folder and in reports: cfg.name, followed by cfg.tag if it is set.

    Raises:
        UserError: it cannot be the name of a folder.
    """
    name, tag = cfg.name, getattr(cfg, "tag", None)
    for key, value in (("name", name), ("tag", tag)):
        if value is not None and not re.fullmatch(FOLDER_NAME, value):
            raise UserError(f"{key}={value!r}: not a folder name; {FOLDER_NAME_RULE}")
    return str(name if tag is None else f"{name}-{tag}")


def result_keys(cfg: Config) -> dict[str, Any]:
    """The dotted keys whose values can change what a run computes, with plain values."""
    return {key: value for key, field, value in settings(cfg) if field.metadata.get("affects_result", True)}


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten ``{"model": {"name": "lstm"}}`` to ``{"model.name": "lstm"}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def settings(cfg: Any, prefix: str = "", parent: Field[Any] | None = None) -> Iterator[tuple[str, Field[Any], Any]]:
    """Iterate over a structured configuration: dotted key, field of the schema, resolved value.

    Keys below ``args``, which has no schema, come with the field of ``args``.

    Raises:
        UserError: a key is unknown, a value is missing or cannot be resolved.
    """
    schema = OmegaConf.get_type(cfg)
    declared: Any = getattr(schema, "__dataclass_fields__", dict.fromkeys(cfg, parent))
    if parent is None and not is_dataclass(schema):
        raise UserError("the configuration is not composed from the schema in indrnn.config")
    for name in {**declared, **dict.fromkeys(cfg)}:
        key = f"{prefix}{name}"
        if name not in declared:  # added with +
            raise UserError(unknown_key(key))
        try:
            value = cfg[name]
        except OmegaConfBaseException as error:
            raise UserError(f"{key}: {str(error).splitlines()[0]}; set {key}=...") from error
        if isinstance(value, DictConfig):
            yield from settings(value, f"{key}.", declared[name])
        else:
            value = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
            yield key, declared[name], value


def _check_range(key: str, value: object, limits: Mapping[str, Any]) -> None:
    if not isinstance(value, limits.get("text", object)):
        raise UserError(f"{key}={as_typed(value)}: not a text; write the text in quotes")
    if value == []:
        raise UserError(f"{key}=[]: the list is empty; give at least one value")
    choices = limits.get("choices")
    for element in value if isinstance(value, list) else [value]:
        if choices is not None and element not in choices:
            raise UserError(f"{key}={element}: choose one of {', '.join(map(as_typed, choices))}")
        if isinstance(element, bool) or not isinstance(element, int | float):
            continue
        if isinstance(element, float) and not math.isfinite(element):
            raise UserError(f"{key}={element}: it must be a finite number")
        given = {"maximum": _LARGEST_INTEGER if isinstance(element, int) else None, **limits}
        bounds = {kind: given[kind] for kind in _BOUNDS if given.get(kind) is not None}
        if not all(_BOUNDS[kind][1](element, limit) for kind, limit in bounds.items()):
            allowed = " and ".join(f"{_BOUNDS[kind][0]} {limit:,}" for kind, limit in bounds.items())
            raise UserError(f"{key}={element}: it must be {allowed}")


def _check_together(cfg: Config) -> None:
    from ..data import make_task  # imports NumPy

    run_name(cfg)
    task = make_task(cfg.data)
    if cfg.trainer.label_smoothing > 0 and not task.measures_accuracy:
        raise UserError(f"trainer.label_smoothing={cfg.trainer.label_smoothing}: {task.name} has no classes; use 0")
    model: Any = cfg.model
    fixed = getattr(model, "last_layer_fixed", None)
    if fixed is not None and model.constraint != "none" and abs(fixed) > (bound := model.gamma ** (1 / task.length)):
        raise UserError(f"model.last_layer_fixed={fixed}: its size must be at most model.gamma^(1/T) = {bound:.6g}")


def as_typed(value: object) -> str:
    """A value as typed on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def unknown_key(key: str) -> str:
    """One line about an unknown key: the choices that have it, or the closest known key."""
    group, _, name = key.partition(".")
    choices: dict[str, Any] = SCHEMAS.get(group, {})
    having = [c for c, schema in choices.items() if name in schema.__dataclass_fields__ and c != "external"]
    if having:
        return f"{key}: unknown key for the chosen {group}; it belongs to {group}={', '.join(having)}"
    known = [other for other in ("experiment", *dict(all_keys())) if other != key]
    # lr -> optimizer.lr, layers -> model.num_layers: perhaps only the last part is given.
    last = {other.rpartition(".")[2]: other for other in reversed(known)}
    matches = get_close_matches(key, [other for other in known if "." in key or "." not in other], n=1)
    matches = matches or [last[other] for other in get_close_matches(key.rpartition(".")[2], last, n=1)]
    return f"{key}: unknown key; {f'did you mean {matches[0]}' if matches else 'indrnn-train --help lists all keys'}"
