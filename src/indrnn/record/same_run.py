"""Whether two configurations are the same run: a comparison key by key, without keys that cannot change the result."""

from typing import Any, NamedTuple

from ..config.checks import as_typed, flatten, result_keys, settings
from ..config.schema import Config, all_keys

ABSENT = "(absent)"
# Their rate depends on max_steps at every step, so a larger one is another run from the first step on.
SCHEDULES_OF_MAX_STEPS = ("cosine", "one_cycle")

# What runs did before these keys existed, by the name of the network or schedule that has them.
EARLIER_MEANING: dict[tuple[str, str], dict[str, Any]] = {
    ("model", "lstm"): {"weight_init": "glorot", "bias_init": "forget"},
    ("schedule", "plateau"): {"restore_best": False},
}
# Networks that once had their own names and differ only in size or initialisation.
EARLIER_NAMES = {"lstm_matched": "lstm", "lstm_chrono": "lstm"}
EARLIER_TARGETS = {"indrnn.models.gru.GRUClassifier": "indrnn.models.baselines.GRUClassifier"}
# Removed keys, with the value that stands for what is always done now.
FORMER_KEYS = {("model", "norm_position"): "after"}


class Difference(NamedTuple):
    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {as_typed(self.old)} -> {as_typed(self.new)}"


def in_terms_of_today(config: dict[str, Any]) -> dict[str, Any]:
    """A stored configuration in today's keys and names, because recorded runs must survive changes of the schema."""
    today = {key: dict(value) if isinstance(value, dict) else value for key, value in config.items()}
    model = today["model"]
    if model.get("name") in EARLIER_NAMES:
        model["name"] = EARLIER_NAMES[model["name"]]
    if model.get("_target_") in EARLIER_TARGETS:
        model["_target_"] = EARLIER_TARGETS[model["_target_"]]
    for (group, name), values in EARLIER_MEANING.items():
        if today[group].get("name") == name:
            today[group] = {**values, **today[group]}
    for (group, key), value in FORMER_KEYS.items():
        if today[group].get(key) == value:
            del today[group][key]
    return today


def neutral_keys() -> frozenset[str]:
    """The keys that the schema declares with affects_result=False, such as data.root."""
    return frozenset(key for key, field in all_keys() if not field.metadata.get("affects_result", True))


def differences(old: dict[str, Any], cfg: Config) -> list[Difference]:
    """The keys that affect the result and differ between a stored configuration (`in_terms_of_today`) and ``cfg``, in
    the schema's order."""
    before = flatten(old)
    after = result_keys(cfg)
    removed = before.keys() - {key for key, _, _ in settings(cfg)} - neutral_keys()
    pairs = [Difference(key, before.get(key, ABSENT), new) for key, new in after.items()]
    pairs += [Difference(key, before[key], ABSENT) for key in before if key in removed]
    return [pair for pair in pairs if pair.old != pair.new]


def continues(differ: list[Difference], cfg: Config) -> bool:
    """Whether only max_steps differs and is larger: then ``cfg`` is the same run, continued for longer."""
    return (
        [difference.key for difference in differ] == ["trainer.max_steps"]
        and isinstance(differ[0].old, int)
        and differ[0].new > differ[0].old
        and cfg.schedule.name not in SCHEDULES_OF_MAX_STEPS
    )


def fingerprint(cfg: Config, provenance: dict[str, Any]) -> dict[str, Any]:
    """What identifies a run: the keys that affect its result (the seed among them) and the hashes of its data."""
    return {"config": result_keys(cfg), "data": flatten(provenance)}


def fingerprint_differences(stored: dict[str, Any], cfg: Config, provenance: dict[str, Any]) -> list[Difference]:
    """The differences between a stored `fingerprint` and this run. Hashes that only one of the two has are ignored."""
    config: dict[str, Any] = {}
    for key, value in stored["config"].items():
        group, _, name = key.partition(".")
        if name:
            config.setdefault(group, {})[name] = value
        else:
            config[key] = value
    differ = differences(in_terms_of_today(config), cfg)
    data = flatten(provenance)
    return ([] if continues(differ, cfg) else differ) + [
        Difference(f"data.{key}", old, data[key])
        for key, old in stored["data"].items()
        if key in data and data[key] != old
    ]
