"""Compose the configuration from ``configs/`` with Hydra; errors are one line with a remedy."""

import copy
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError  # type: ignore[import-untyped]

from ..errors import UserError
from .checks import check, flatten, type_problem
from .schema import SCHEMAS, Config, all_keys

# Plugins of Hydra that the extra "sweep" installs.
_SWEEP_PLUGINS = {("hydra/launcher", name) for name in ("joblib", "ray", "submitit_local", "submitit_slurm")}
# The folder of files with what an experiment sets for one model only.
_FOR_MODEL = "experiment/for_model"


def config_dir(package: Path | None = None) -> Path:
    """The absolute path of the folder with ``train.yaml``, for the package in the folder ``package`` (by default
    this one): inside the package once installed, at the top of a checkout.

    Raises:
        UserError: it is neither in the package nor in the checkout around it.
    """
    package = package or Path(__file__).resolve().parents[1]
    candidates = [package / "configs"]
    # A checkout has src/indrnn, without a copy in it; anywhere else a folder named configs is not ours.
    if package.parent.name == "src":
        candidates.append(package.parents[1] / "configs")
    for candidate in candidates:
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(f"no train.yaml in {' or '.join(map(str, candidates))}; install indrnn again")


def load_config(overrides: Iterable[str] = (), config_name: str = "train", config_dir: str | None = None) -> Config:
    """The checked configuration that ``indrnn-train <overrides>`` would run.

    Args:
        overrides: as on the command line, for example ``["model=lstm", "optimizer.lr=1e-3"]``.
        config_name: the primary file, without its ending.
        config_dir: a folder of further choices, as ``--config-dir``.

    Raises:
        UserError: as the command would refuse the same request.
    """
    cfg = Composer(config_name, config_dir).compose(list(overrides))
    check(cfg)
    return cfg


class _FurtherChoices(SearchPathPlugin):
    """Adds the current `Composer`'s folder to Hydra's search path, as ``--config-dir`` does."""

    folder: str | None = None

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        if self.folder is not None:
            search_path.append("command-line", f"file://{self.folder}")


class Composer:
    """Composes configurations from one primary file.

    Args:
        config_name: the primary file, without its ending.
        extra: a folder of further choices, as for ``--config-dir``.

    Raises:
        UserError: the folder is missing.
    """

    def __init__(self, config_name: str = "train", extra: str | None = None) -> None:
        if extra is not None and not os.path.isdir(extra):
            raise UserError(f"--config-dir {extra}: there is no such folder")
        self._config_name = config_name
        self._folder = None if extra is None else os.path.abspath(extra)
        self._by_choices: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> Config:
        """The configuration of one job, with keys and types checked; ranges are left to `check`.

        Raises:
            UserError: an override or a file has a key, a choice or a type of value that does not exist.
        """
        with self._loader() as loader:
            parsed = _parse(overrides, loader)
            _check_choices(parsed, loader)
            # Those that set a key of ours, rather than choose a file or set a key of Hydra's.
            values = [
                override
                for override in parsed
                if not (override.is_hydra_override() or override.package is not None or _chooses_file(override, loader))
            ]
            chosen = tuple(str(override.input_line) for override in parsed if override not in values)
            if chosen not in self._by_choices:
                self._by_choices[chosen] = compose(self._config_name, list(chosen), return_hydra_config=True)
        cfg = copy.deepcopy(self._by_choices[chosen])
        # Checked against the composed files, which shows keys that belong to another model.
        _check_keys(values, cfg)
        for override in values:
            try:
                OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True, force_add=True)
            except (OmegaConfBaseException, ValueError, OverflowError) as error:
                raise UserError(f"{override.input_line}: {type_problem(str(error))}") from error
        with flag_override(cfg, ["struct", "readonly"], False):
            # If the name cannot be resolved, `check` will report it.
            with suppress(OmegaConfBaseException):
                cfg.name = cfg.name
            cfg.pop("hydra")
        return cast(Config, cfg)

    def jobs(self, overrides: Sequence[str]) -> list[list[str]]:
        """The overrides of every job of ``-m``, in the order of Hydra's basic sweeper; for another sweeper, one job
        without the swept keys.

        Raises:
            UserError: an override cannot be read, or is a range that the basic sweeper cannot enumerate.
        """
        jobs: list[list[str]] = [[]]
        with self._loader() as loader:
            parsed = _parse(overrides, loader, sweep=True)
            if any(override.key_or_group == "hydra/sweeper" for override in parsed):
                parsed = [override for override in parsed if not override.is_sweep_override()]
            for override in parsed:
                words = [str(override.input_line)]
                if override.is_sweep_override():
                    try:
                        words = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
                    except (HydraException, ValueError) as error:
                        raise UserError(f"{words[0]}: {str(error).splitlines()[0]}") from error
                jobs = [[*job, word] for job in jobs for word in words]
        return jobs

    def choices(self) -> dict[str, list[str]]:
        """Every group with its choices."""
        with self._loader() as loader:
            groups = set(loader.list_groups("")) - {"hydra", "schema"}
            return {group: loader.get_group_options(group) for group in [*SCHEMAS, *sorted(groups - set(SCHEMAS))]}

    def for_models(self) -> dict[str, dict[str, Any]]:
        """The settings that an experiment has for one model only: <experiment>_<model>, its keys and values."""
        content: dict[str, dict[str, Any]] = {}
        with self._loader() as loader:
            for name in loader.get_group_options(_FOR_MODEL):
                cfg = compose(f"{_FOR_MODEL}/{name}")
                keys = flatten(OmegaConf.to_container(cfg, resolve=False))
                content[name] = {key: OmegaConf.select(cfg, key) for key in keys}
        return content

    @contextmanager
    def _loader(self) -> Iterator[ConfigLoader]:
        _FurtherChoices.folder = self._folder
        try:
            with initialize_config_dir(str(config_dir()), job_name="indrnn-train", version_base="1.3"):
                yield GlobalHydra.instance().config_loader()
        except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, OverflowError) as error:
            raise UserError(plain_message(error)) from error
        finally:
            _FurtherChoices.folder = None


# Overrides are checked before Hydra sees them, because Hydra lets ``+key`` add keys that are in no schema.


def _parse(overrides: Sequence[str], loader: ConfigLoader, sweep: bool = False) -> list[Override]:
    """Parse ``key=value`` words; with ``sweep``, ``key=value,value`` is allowed."""
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for text in overrides:
        try:
            override = parser.parse_overrides([text])[0]
        except HydraException:
            override = None
        if override is None or not override.key_or_group:
            remedy = "write key=value, and quote values with special characters, as 'key=\"a b\"'"
            raise UserError(f"{text!r} cannot be read: {remedy}")
        if override.is_sweep_override() and not sweep:
            raise UserError(
                f"{text}: several values are a sweep, which needs -m; a list is written [1,2], a text '1,2'"
            )
        parsed.append(override)
    return parsed


def _chooses_file(override: Override, loader: ConfigLoader) -> bool:
    parent, _, name = override.key_or_group.rpartition("/")
    return "." not in name and name in loader.get_group_options(parent, results_filter=ObjectType.GROUP)


def _check_choices(overrides: Sequence[Override], loader: ConfigLoader) -> None:
    search = [str(override.input_line) for override in overrides if override.key_or_group == "hydra.searchpath"]
    for override in overrides:
        if not _chooses_file(override, loader):
            continue
        group = override.key_or_group
        if group in SCHEMAS and (override.is_delete() or override.is_add() or override.is_force_add()):
            raise UserError(f"{override.input_line}: there is always one {group}; write {group}=<choice> to pick it")
        if override.is_delete():
            continue
        choices = sorted(loader.get_group_options(group, overrides=search))
        choice = override.value()
        if isinstance(choice, list):
            raise UserError(f"{override.input_line}: choose one {group}; choices: {', '.join(choices)}")
        if choice is None and group not in SCHEMAS:
            continue
        if str(choice) not in choices:
            written = "null" if choice is None else str(choice)
            hint = _suggestion(written, choices)
            if (group, written) in _SWEEP_PLUGINS:
                hint = "; it comes with pip install 'indrnn[sweep]'"
            raise UserError(f"{group}={written}: there is no such choice{hint}; choices: {', '.join(choices)}")


def _check_keys(overrides: Iterable[Override], cfg: DictConfig) -> None:
    """Look up the key of every override in ``cfg``, the configuration composed from the chosen files."""
    plain = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=False))
    del plain["hydra"]
    known = flatten(plain)
    choices = {str(key): str(value) for key, value in cfg.hydra.runtime.choices.items()}
    for override in overrides:
        key = override.key_or_group
        group, _, name = key.partition(".")
        # The target itself refuses arguments that it does not take.
        free = name.split(".")[0] == "args" and "args" in cfg.get(group, {})
        if free and key not in known and not override.is_add():
            hint = _suggestion(key, known)
            raise UserError(
                f"{key}: {group}={choices[group]} does not set it{hint}; to add it, write +{override.input_line}"
            )
        if not free and key not in known and key.split("[")[0] not in known:
            raise UserError(_unknown_key(key, [*known, *(group for group in choices if "/" not in group)], choices))
        if name == "name" and group in SCHEMAS and override.value() != cfg[group].name:
            raise UserError(f"{override.input_line}: a name comes with its file; write {group}={override.value()}")
        if override.is_delete():
            raise UserError(f"~{key}: a key cannot be removed; give it another value")
        if override.is_add() and not free:
            raise UserError(f"+{key}: the key exists already; write {str(override.input_line).lstrip('+')}")


# Error messages: Hydra's and OmegaConf's in one line, and suggestions for misspelt words.


def plain_message(error: BaseException) -> str:
    """The message of an exception of Hydra, OmegaConf or PyYAML in one line, without search paths and hints about
    Hydra."""
    cause: BaseException | None = error
    while cause is not None and not str(cause).strip():
        cause = cause.__cause__
    if isinstance(cause, MarkedYAMLError):
        mark = cause.problem_mark
        where = f"{mark.name}, line {mark.line + 1}: " if mark else ""
        return f"{where}{cause.problem or 'cannot be read as YAML'}"
    text = str(cause or error)
    merging = re.match(r"Error merging override (.*)", text)
    if merging:
        return f"{merging[1]}: {type_problem(str(error.__cause__ or ''))}"
    in_file = re.match(r"In '(.*)': \w+ raised while composing config:\n(.*)", text, re.DOTALL)
    if in_file:
        return f"{in_file[1]}.yaml: {_file_problem(in_file[2])}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = re.search(r"full_key: (\S+)", text) if isinstance(error, OverflowError) else None
    return f"{key[1]}: {lines[0]}" if key else lines[0] if lines else type(error).__name__


def _file_problem(text: str) -> str:
    """OmegaConf's error about a value in a file, in plain words: the key, then the problem."""
    key = re.search(r"full_key: (\S+)", text)
    missing = re.match(r"Key '.*' not in '(\w+)'", text)
    if key and key[1] == "experiment":
        return "its first line must be '# @package _global_', so that its keys are those of the whole configuration"
    if key and missing:
        schemas = {(group, schema.__name__): name for group, of in SCHEMAS.items() for name, schema in of.items()}
        chosen = {group: name for (group, schema), name in schemas.items() if schema == missing[1]}
        return _unknown_key(key[1], [name for name, _ in all_keys()], chosen)
    return f"{key[1] + ': ' if key else ''}{type_problem(text)}"


def _suggestion(word: str, known: Iterable[str]) -> str:
    """``"; did you mean a or b"`` for the closest known words, or an empty string."""
    # A word with a dot is no group.
    candidates = sorted(key for key in set(known) if "." in key or "." not in word)
    matches = get_close_matches(word, candidates, n=2, cutoff=0.6)
    if not matches:
        # layers -> model.num_layers, lr -> optimizer.lr: perhaps only the last part, or some of it, is right.
        last = word.rsplit(".", 1)[-1]
        tails = {key.rsplit(".", 1)[-1]: key for key in reversed(candidates)}
        matches = [tails[tail] for tail in get_close_matches(last, tails, n=2, cutoff=0.6)]
    return f"; did you mean {' or '.join(matches)}" if matches else ""


def _unknown_key(key: str, known: Iterable[str], choices: dict[str, str]) -> str:
    """One line for a key that the composed configuration lacks.

    Args:
        key: as written, dotted.
        known: all keys of the composed configuration.
        choices: the chosen file of each group, for example ``{"model": "lstm"}``.
    """
    message = f"{key}: there is no such key"
    group, _, name = key.partition(".")
    if f"{group}.args.{name}" in known:
        return f"{message}; did you mean {group}.args.{name}"
    schemas = SCHEMAS.get(group, {}).items()
    having = [choice for choice, schema in schemas if name in {field.name for field in fields(schema)}]
    if having:
        return f"{message} with {group}={choices.get(group, '?')}; it belongs to {group}={', '.join(having)}"
    return message + (_suggestion(key, known) or "; indrnn-train --cfg job lists all")


# Registered with Hydra.


def _name_by_choices(*, _root_: DictConfig) -> str:
    """The name of a run, from the files that its command chose: the user's own primary file, experiment and model."""
    # Hydra removes its own node from the configuration that a job gets, and keeps it in HydraConfig.
    hydra: Any = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    choices = hydra.runtime.choices
    words = [hydra.job.config_name if hydra.job.config_name != "train" else None, choices.get("experiment")]
    return "_".join(filter(None, [*words, choices.model])).replace("/", "-")


OmegaConf.register_new_resolver("run_name", _name_by_choices, replace=True)
Plugins.instance().register(_FurtherChoices)
_store = ConfigStore.instance()
_store.store(group="schema", name="config", node=Config)
for _group, _choices in SCHEMAS.items():
    # A file of configs/ names its dataclass as /schema/<group>/<name>.
    for _choice, _node in _choices.items():
        _store.store(group=f"schema/{_group}", name=_choice, node=_node)
