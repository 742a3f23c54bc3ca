"""Composing the configuration from ``configs/`` with Hydra, and saying in one line what is wrong with a request."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins
from hydra.core.utils import setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, flag_override
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from ..errors import UserError
from .checks import check
from .overrides import check_groups, check_keys, is_group, parse_overrides
from .paths import config_dir as default_config_dir
from .schema import SCHEMAS, Config
from .wording import one_line


def register_schemas() -> None:
    """Put the dataclasses where ``/schema/<group>/<name>`` finds them; safe to call again."""
    store = ConfigStore.instance()
    store.store(group="schema", name="config", node=Config)
    for group, choices in SCHEMAS.items():
        for name, node in choices.items():
            store.store(group=f"schema/{group}", name=name, node=node)


register_schemas()


def config_loader(primary: Path, extra: str | None = None) -> ConfigLoaderImpl:
    """Hydra's loader over the folder ``primary``, and before it ``extra`` as for ``--config-dir``."""
    Plugins.instance()
    setup_globals()
    search_path = create_config_search_path(str(primary))
    if extra is not None:
        folder = os.path.abspath(extra)
        if not os.path.isdir(folder):
            raise UserError(f"--config-dir {extra}: no such folder")
        search_path.prepend("command-line", f"file://{folder}", SearchPathQuery(provider="schema"))
    return ConfigLoaderImpl(search_path)


def compose(loader: ConfigLoaderImpl, overrides: Sequence[str], config_name: str) -> DictConfig:
    """Compose one job's configuration, unchecked apart from its keys and types.

    Raises:
        UserError: an override or a file names a key or a choice that does not exist, or has a value of another type.
    """
    parsed = parse_overrides(overrides)
    check_groups(parsed, loader)
    # Keys are looked up in what the chosen files compose to, so that a key of another model is recognised as one.
    values = [override for override in parsed if not is_group(override, loader)]
    groups = [str(override.input_line) for override in parsed if override not in values]
    check_keys(values, _load(loader, groups, config_name))
    cfg = _load(loader, list(overrides), config_name)
    with flag_override(cfg, ["struct", "readonly"], False):
        cfg.pop("hydra", None)
    return cfg


def load_config(overrides: Iterable[str] = (), config_name: str = "train", config_dir: str | None = None) -> DictConfig:
    """The checked configuration that ``indrnn-train <overrides>`` would run.

    Args:
        overrides: as on the command line, for example ``["model=lstm", "optimizer.lr=1e-3"]``.
        config_name: the primary file, without its ending.
        config_dir: a folder of further choices, as ``--config-dir``.

    Raises:
        UserError: as the command would refuse the same request.
    """
    cfg = compose(config_loader(default_config_dir(), config_dir), list(overrides), config_name)
    check(cfg)
    return cfg


def _load(loader: ConfigLoaderImpl, overrides: list[str], config_name: str) -> DictConfig:
    try:
        return loader.load_configuration(config_name, overrides, RunMode.RUN)
    except (HydraException, OmegaConfBaseException, YAMLError, OSError) as error:
        raise UserError(one_line(error)) from error
