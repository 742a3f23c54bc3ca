"""Compare configurations key by key, without the keys that cannot change a result."""

from collections.abc import Mapping
from typing import Any

from ..config.compose import as_typed, flatten, result_keys
from ..config.schema import Config, all_keys

ABSENT = "(absent)"


def neutral_keys() -> frozenset[str]:
    """The keys that the schema declares with affects_result=False, such as data.root."""
    return frozenset(key for key, field in all_keys() if not field.metadata.get("affects_result", True))


def differences(old: Mapping[str, Any], cfg: Config) -> list[str]:
    """The differences between a stored configuration (dotted keys) and ``cfg``, as ``key: old -> new``."""
    return _differences({key: value for key, value in old.items() if key not in neutral_keys()}, result_keys(cfg))


def fingerprint(cfg: Config, provenance: dict[str, Any]) -> dict[str, Any]:
    """What identifies a run: the keys that affect its result (including the seed) and the hashes of its data."""
    return {"config": result_keys(cfg), "data": flatten(provenance)}


def fingerprint_differences(stored: dict[str, Any], cfg: Config, provenance: dict[str, Any]) -> list[str]:
    """The differences between a stored `fingerprint` and this run."""
    data = _differences(flatten({"data": stored["data"]}), flatten({"data": provenance}))
    return differences(stored["config"], cfg) + data


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A key that only one of the two has is a difference."""
    pairs = {key: (old.get(key, ABSENT), new.get(key, ABSENT)) for key in {**new, **old}}
    return [f"{key}: {as_typed(before)} -> {as_typed(now)}" for key, (before, now) in pairs.items() if before != now]
