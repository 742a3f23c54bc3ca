"""Composition of the configuration from ``configs/`` with Hydra, Hydra's errors as one line, and checks of the values:
unknown keys, the ranges of the schema, and conditions on several keys."""

import math
import operator
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import Field, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from hydra import compose
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.version import setbase
from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ..errors import UserError
from .schema import FOLDER_NAME, FOLDER_NAME_RULE, SCHEMAS, Config, all_keys

_package = Path(__file__).resolve().parents[1]
# In the package once installed, at the top of a checkout.
CONFIG_DIR = _package / "configs" if (_package / "configs").is_dir() else _package.parents[1] / "configs"

_BOUNDS = {
    "minimum": ("at least", operator.ge),
    "above": ("above", operator.gt),
    "maximum": ("at most", operator.le),
    "below": ("below", operator.lt),
}
# The limit of int32 indices, for integers without a maximum.
_LARGEST_INTEGER = 2**31 - 1


def load_config(overrides: Iterable[str] = (), config_name: str = "train", config_dir: str | None = None) -> Config:
    """Compose and check the configuration that ``indrnn-train <overrides>`` runs.

    Args:
        overrides: as on the command line, for example ``["model=lstm", "optimizer.lr=1e-3"]``.
        config_name: the primary file, without its extension.
        config_dir: a folder of additional choices, as ``--config-dir``.

    Raises:
        UserError: the command would refuse the same request.
    """
    search_path = create_config_search_path(str(CONFIG_DIR))
    if config_dir is not None:
        if not os.path.isdir(config_dir):
            raise UserError(f"--config-dir {config_dir}: no such folder")
        search_path.prepend("command-line", f"file://{os.path.abspath(config_dir)}", anchor="schema")
    # As hydra.main with --config-dir: the public initialize_config_dir knows one folder only.
    application = GlobalHydra.instance().hydra  # we may be inside of a Hydra application
    GlobalHydra.instance().clear()
    try:
        setbase("1.3")
        Hydra.create_main_hydra2(JobRuntime.instance().get("name"), search_path)
        composed = compose(config_name, list(map(keep_text, overrides)), return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, OverflowError) as error:
        raise UserError(one_line(error)) from error
    finally:
        GlobalHydra.instance().hydra = application
    return job_config(composed, composed.hydra)


def job_config(composed: DictConfig, hydra: Any) -> Config:
    """The checked configuration of one job, without Hydra's node. Raises UserError like `check`."""
    for override in job_overrides(hydra):
        group, name, _ = override.lstrip("+").partition(".name=")
        if name and group in SCHEMAS:
            raise UserError(f"{override}: the name is part of the chosen file; choose another one with {group}=...")
    with flag_override(composed, ["struct", "readonly"], False):
        for key in ("name", "tag", "output_root"):
            # The name refers to Hydra's node, a tag may to a number. `check` reports what cannot be resolved.
            with suppress(OmegaConfBaseException):
                if OmegaConf.is_interpolation(composed, key) and composed[key] is not None:
                    composed[key] = str(composed[key])
        composed.pop("hydra", None)
    cfg = cast(Config, composed)
    check(cfg)
    return cfg


def job_overrides(hydra: Any) -> list[str]:
    """The overrides of a job, without those of Hydra's own keys."""
    return cast(list[str], OmegaConf.to_container(hydra.overrides.task, resolve=False))


_TEXT_KEYS = {*SCHEMAS, "experiment"} | {
    key for key, field in all_keys() if field.type in (str, str | None) or "text" in field.metadata
}
_NOT_TEXT = re.compile(r"\s*([+-]?(\.?\d|inf|nan)|true|false|~)", re.IGNORECASE)


def keep_text(override: str) -> str:
    """Quote what Hydra would convert to a number in a text: ``tag=5e41726`` is not inf. Quoted values and functions
    stay as they are."""
    key, equals, value = override.partition("=")
    if key.lstrip("+") not in _TEXT_KEYS or re.search(r"""['"\\$()\[\]{}]""", value):
        return override
    return key + equals + ",".join(f"'{word.strip()}'" if _NOT_TEXT.match(word) else word for word in value.split(","))


def one_line(error: BaseException) -> str:
    """The message of an exception that Hydra, OmegaConf or PyYAML raised, in one line."""
    cause, text = error.__cause__ or error.__context__, str(error)
    if isinstance(error, OverrideParseException):
        return f"cannot parse {error.override!r}; write key=value and quote special characters, as in 'key=\"a b\"'"
    if isinstance(error, MissingConfigException) and error.options:
        return f"{'='.join(str(error.missing_cfg_file).rsplit('/', 1))}: choose one of {', '.join(error.options)}"
    # Hydra's text explains how to append to args.
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and ".args." not in text:
        file, override = re.match("In '.*?': ", text), re.match("Could not override '(.*)'", text)
        return (file[0] if file else "") + unknown_key(override[1] if override else str(cause.full_key))
    if text.startswith("Error merging override"):
        text += f": {str(cause).splitlines()[0]}"
    return " ".join(text.split()) or type(error).__name__


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
    minimum = getattr(cfg.schedule, "minimum_lr", 0.0)
    if minimum >= cfg.optimizer.lr:
        raise UserError(f"schedule.minimum_lr={minimum}: it must be below optimizer.lr={cfg.optimizer.lr}")
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


def _run_name(*, _root_: DictConfig) -> str:
    """The name of a run: the user's own primary file, the experiment and the model that the command chooses."""
    # A job gets the configuration without Hydra's node.
    hydra: Any = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    choices = hydra.runtime.choices
    words = [hydra.job.config_name if hydra.job.config_name != "train" else None, choices.get("experiment")]
    return "_".join(filter(None, [*words, choices.model])).replace("/", "-")


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
# The folder of an empty path is the current one.
OmegaConf.register_new_resolver("expanduser", lambda path: os.path.expanduser(path) or ".", replace=True)
_store = ConfigStore.instance()
_store.store(group="schema", name="config", node=Config)
for _group, _choices in SCHEMAS.items():
    # A file of configs/ names its dataclass as /schema/<group>/<name>.
    for _choice, _node in _choices.items():
        _store.store(group=f"schema/{_group}", name=_choice, node=_node)
