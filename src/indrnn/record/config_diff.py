"""Compare configurations key by key, without the keys that cannot change a result."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config.compose import as_typed, flatten, result_keys
from ..config.schema import Config, all_keys

ABSENT = "(absent)"
# These schedules depend on max_steps at every step, so a larger value is a different run from the first step.
SCHEDULES_OF_MAX_STEPS = ("cosine", "one_cycle")


class Difference(NamedTuple):
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {as_typed(self.old)} -> {as_typed(self.new)}"


def neutral_keys() -> frozenset[str]:
    """The keys that the schema declares with affects_result=False, such as data.root."""
    return frozenset(key for key, field in all_keys() if not field.metadata.get("affects_result", True))


def differences(old: Mapping[str, Any], cfg: Config) -> list[Difference]:
    """The differences between a stored configuration (dotted keys) and ``cfg``, unless ``cfg`` is the same run with a
    larger max_steps and a schedule that does not depend on it."""
    differ = _differences({key: value for key, value in old.items() if key not in neutral_keys()}, result_keys(cfg))
    if [key for key, *_ in differ] == ["trainer.max_steps"] and cfg.schedule.name not in SCHEDULES_OF_MAX_STEPS:
        [(_, steps, more)] = differ
        return [] if isinstance(steps, int) and more > steps else differ
    return differ


def fingerprint(cfg: Config, provenance: dict[str, Any]) -> dict[str, Any]:
    """What identifies a run: the keys that affect its result (including the seed) and the hashes of its data."""
    return {"config": result_keys(cfg), "data": flatten(provenance)}


def fingerprint_differences(stored: dict[str, Any], cfg: Config, provenance: dict[str, Any]) -> list[Difference]:
    """The differences between a stored `fingerprint` and this run."""
    data = _differences(flatten({"data": stored["data"]}), flatten({"data": provenance}))
    return differences(stored["config"], cfg) + data


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    """A key that only one of the two has is a difference."""
    pairs = [Difference(key, old.get(key, ABSENT), new.get(key, ABSENT)) for key in {**new, **old}]
    return [pair for pair in pairs if pair.old != pair.new]
