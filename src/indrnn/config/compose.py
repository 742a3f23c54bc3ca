"""Composing the configuration from ``configs/`` with Hydra, and saying in one line what is wrong with a request."""

import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ..errors import UserError
from .checks import check
from .overrides import check_groups, check_keys, expand_sweep, is_value, parse_overrides
from .paths import config_dir
from .schema import SCHEMAS, Config
from .wording import one_line


def register() -> None:
    """Put the dataclasses where ``/schema/<group>/<name>`` finds them, and ``${run_name:}``; safe to call again."""
    OmegaConf.register_new_resolver("run_name", run_name, replace=True)
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, choices in SCHEMAS.items():
        for name, node in choices.items():
            store.store(group=f"schema/{group}", name=name, node=node)


def run_name(*, _root_: DictConfig) -> str:
    """A run is named after the files that its command chose, so that a variant of one has a name of its own: the
    experiment, the model, or both; a primary file of the user's own comes first; with nothing chosen, the model."""
    # Hydra takes its own node away from what a job gets, and keeps it apart.
    hydra: Any = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    choices = hydra.runtime.choices
    words = [hydra.job.config_name if hydra.job.config_name != "train" else None, choices.get("experiment")]
    if not any(words) or any(word.startswith("model=") for word in hydra.overrides.task):
        words.append(choices.model)
    return "_".join(filter(None, words)).replace("/", "-")


register()


class Composer:
    """Composes configurations from one primary file.

    Args:
        config_name: the primary file, without its ending.
        extra: a folder of further choices, searched first, as for ``--config-dir``.

    Raises:
        UserError: the folder is missing.
    """

    def __init__(self, config_name: str = "train", extra: str | None = None) -> None:
        Plugins.instance()
        setup_globals()
        search_path = create_config_search_path(str(config_dir()))
        if extra is not None:
            folder = os.path.abspath(extra)
            if not os.path.isdir(folder):
                raise UserError(f"--config-dir {extra}: there is no such folder")
            search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
        self.config_name = config_name
        self.loader = ConfigLoaderImpl(search_path)
        self._by_groups: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """One job's configuration; its keys and types are right, the rest is for `check`.

        Raises:
            UserError: an override or a file has a key, a choice or a type of value that does not exist.
        """
        parsed = parse_overrides(overrides, self.loader)
        check_groups(parsed, self.loader)
        values = [override for override in parsed if is_value(override, self.loader)]
        # Keys are looked up in what the chosen files compose to, so that a key of another model is recognised as one.
        cfg = self._load(tuple(str(override.input_line) for override in parsed if override not in values))
        check_keys(values, cfg)
        with _in_one_line():
            ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
        with flag_override(cfg, ["struct", "readonly"], False):
            # What cannot be resolved is reported by `check`.
            with suppress(OmegaConfBaseException):
                cfg.name = cfg.name
            cfg.pop("hydra")
        return cfg

    def jobs(self, overrides: Sequence[str]) -> list[list[str]]:
        """The overrides of every job of a sweep; the whole, as one job, if another sweeper than Hydra's own runs it.

        Raises:
            UserError: an override cannot be read.
        """
        parsed = parse_overrides(overrides, self.loader, sweep=True)
        if any(override.key_or_group == "hydra/sweeper" for override in parsed):
            parsed = [override for override in parsed if not override.is_sweep_override()]
        return expand_sweep(parsed)

    def choices(self) -> dict[str, list[str]]:
        """Every group that a user chooses from, with its choices."""
        groups = [group for group in self.loader.list_groups("") if group not in ("hydra", "schema")]
        order = [*SCHEMAS, *sorted(set(groups) - set(SCHEMAS))]
        return {group: self.loader.get_group_options(group, config_name=None, overrides=[]) for group in order}

    def _load(self, groups: tuple[str, ...]) -> DictConfig:
        if groups not in self._by_groups:
            with _in_one_line():
                self._by_groups[groups] = self.loader.load_configuration(self.config_name, list(groups), RunMode.RUN)
        return copy.deepcopy(self._by_groups[groups])


@contextmanager
def _in_one_line() -> Iterator[None]:
    try:
        yield
    except (HydraException, OmegaConfBaseException, YAMLError, OSError, ValueError, OverflowError) as error:
        raise UserError(one_line(error)) from error


def load_config(overrides: Iterable[str] = (), config_name: str = "train", config_dir: str | None = None) -> DictConfig:
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
