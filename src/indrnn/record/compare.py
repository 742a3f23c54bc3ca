"""Is this the same run? Configurations are compared key by key, leaving out those that cannot change the result."""

import dataclasses
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from ..config.schema import SCHEMAS, Config

ABSENT = "(absent)"


class Difference(NamedTuple):
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.old)} -> {_shown(self.new)}"


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """``{"model": {"name": "lstm"}}`` -> ``{"model.name": "lstm"}``; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def neutral_keys() -> frozenset[str]:
    """The keys that the schema declares with affects_result=False, such as data.root."""
    neutral = {field.name for field in dataclasses.fields(Config) if _is_neutral(field)}
    for group, choices in SCHEMAS.items():
        for schema in choices.values():
            neutral |= {f"{group}.{field.name}" for field in dataclasses.fields(schema) if _is_neutral(field)}
    return frozenset(neutral)


def differences(old: dict[str, Any], cfg: DictConfig) -> list[Difference]:
    """The keys that affect the result and differ between a stored configuration and ``cfg``, in the schema's order.

    A key that did not exist yet when ``old`` was written counts as having had the schema's default, so that adding a
    key to the schema does not disown the runs recorded before.
    """
    before = flatten(old)
    after = flatten(resolved(cfg))
    neutral = neutral_keys()
    defaults = _defaults(cfg)
    found = []
    for key in [*after, *(key for key in before if key not in after)]:
        values = before.get(key, defaults.get(key, ABSENT)), after.get(key, ABSENT)
        if key not in neutral and values[0] != values[1]:
            found.append(Difference(key, *values))
    return found


def resolved(cfg: DictConfig) -> dict[str, Any]:
    """``cfg`` as plain values, interpolations replaced."""
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _is_neutral(field: dataclasses.Field) -> bool:
    return field.metadata.get("affects_result") is False


def _defaults(cfg: DictConfig) -> dict[str, Any]:
    defaults: dict[str, Any] = {}
    for prefix, node in [("", cfg), *((f"{group}.", cfg[group]) for group in SCHEMAS if group in cfg)]:
        schema = OmegaConf.get_type(node)
        if schema is None or not dataclasses.is_dataclass(schema):
            continue
        for field in dataclasses.fields(schema):
            if field.default is not dataclasses.MISSING:
                defaults[prefix + field.name] = field.default
            elif field.default_factory is not dataclasses.MISSING:
                defaults[prefix + field.name] = field.default_factory()
    return defaults


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
