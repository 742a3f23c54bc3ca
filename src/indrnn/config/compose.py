"""Composition of the configuration from ``configs/`` with Hydra, and Hydra's errors as one line."""

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobRuntime
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ..errors import UserError
from .checks import check, flatten, suggestion, unknown_key
from .schema import SCHEMAS, Config, all_keys

# What Hydra raises for a bad request: overrides, files, flags.
COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, ValueError, OverflowError)


def config_dir(package: Path | None = None) -> Path:
    """The absolute path of the folder with ``train.yaml``: in the package once installed, at the top of a checkout.

    Args:
        package: the folder of the package. Default: this one.

    Raises:
        UserError: neither has a ``train.yaml``.
    """
    package = package or Path(__file__).resolve().parents[1]
    candidates = [package / "configs"]
    # Only a checkout has src/indrnn; elsewhere a folder named configs belongs to someone else.
    if package.parent.name == "src":
        candidates.append(package.parents[1] / "configs")
    for candidate in candidates:
        if (candidate / "train.yaml").is_file():
            return candidate
    raise UserError(f"no train.yaml in {' or '.join(map(str, candidates))}; reinstall indrnn")


_config_dir = config_dir  # a parameter of the following functions has the same name


def load_config(overrides: Iterable[str] = (), config_name: str = "train", config_dir: str | None = None) -> Config:
    """Compose and check the configuration that ``indrnn-train <overrides>`` runs.

    Args:
        overrides: as on the command line, for example ``["model=lstm", "optimizer.lr=1e-3"]``.
        config_name: the primary file, without its extension.
        config_dir: a folder of additional choices, as ``--config-dir``.

    Raises:
        UserError: the command would refuse the same request.
    """
    folders, words = [str(_config_dir())], list(map(keep_text, overrides))
    if config_dir is not None:
        if not os.path.isdir(config_dir):
            raise UserError(f"--config-dir {config_dir}: no such folder")
        # Hydra looks for the primary file in the first folder only.
        primary = os.path.isfile(os.path.join(config_dir, f"{config_name}.yaml"))
        folders.insert(0 if primary else 1, os.path.abspath(config_dir))
        words.insert(0, f"hydra.searchpath=['file://{folders[1]}']")
    try:
        with _own_hydra(folders[0]):
            composed = compose(config_name, words, return_hydra_config=True)
    except COMPOSITION_ERRORS as error:
        raise UserError(one_line(error)) from error
    return job_config(composed, composed.hydra)


@contextmanager
def _own_hydra(folder: str) -> Iterator[None]:
    """Initialize Hydra with the files in ``folder``; afterwards, restore an application around us."""
    application = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(folder, job_name=JobRuntime.instance().get("name"), version_base="1.3"):
            yield
    finally:
        GlobalHydra.instance().hydra = application


def job_config(composed: DictConfig, hydra: Any) -> Config:
    """The checked configuration of one job, without Hydra's node.

    Args:
        composed: the composed configuration of the job.
        hydra: its ``hydra`` node.

    Raises:
        UserError: a key is unknown, or a value is out of range.
    """
    for override in job_overrides(hydra):
        group, _, name = override.lstrip("+").partition(".name=")
        if group in SCHEMAS:
            choice = name if (config_dir() / group / f"{name}.yaml").is_file() else "<choice>"
            raise UserError(f"{override}: the name is part of the chosen file; write {group}={choice}")
    with flag_override(composed, ["struct", "readonly"], False):
        # The name refers to Hydra's node. `check` reports a name that cannot be resolved.
        with suppress(OmegaConfBaseException):
            composed.name = composed.name
        composed.pop("hydra", None)
    cfg = cast(Config, composed)
    check(cfg)
    return cfg


def job_overrides(hydra: Any) -> list[str]:
    """The overrides of a job, without those of Hydra's own keys."""
    return cast(list[str], OmegaConf.to_container(hydra.overrides.task, resolve=False))


# An element that starts like a number, with true, false or ~. The first alternative skips what is quoted.
_NOT_TEXT = re.compile(
    r"""('(?:\\.|[^'])*'|"(?:\\.|[^"])*"|\$\{.*?\}|\\.[^,]*)|"""
    r"(?<![^,(])\s*((?:[+-]?(?:\.?\d|inf|nan)|true|false|~)[^,()'\"\\]*?)\s*(?=[,)]|$)",
    re.IGNORECASE,
)


def keep_text(override: str) -> str:
    """Quote the values of a key of type str that Hydra would read as numbers: ``tag=5e41726`` is a text, not inf."""
    key, equals, value = override.partition("=")
    if key.lstrip("+") not in _TEXT_KEYS or re.match(r"\s*(range|interval)\(", value):
        return override
    return key + equals + _NOT_TEXT.sub(lambda match: match[1] or f"'{match[2]}'", value)


_TEXT_KEYS = {*SCHEMAS, "experiment"} | {
    key for key, field in all_keys() if field.type in (str, str | None) or "text" in field.metadata
}


# Hydra's errors in one line, with a suggestion for misspelled keys and choices.


def one_line(error: BaseException) -> str:
    """The message of an exception that Hydra, OmegaConf or PyYAML raised, in one line."""
    cause = error.__cause__ or error.__context__
    text = str(error) or str(cause)
    if isinstance(error, OverrideParseException):
        return f"cannot parse {error.override!r}; write key=value and quote special characters, as in 'key=\"a b\"'"
    if isinstance(error, MissingConfigException):
        choice = re.search(r"Could not find '(.+)/(.+)'", text)
        if choice and error.options:
            hint = suggestion(choice[2], error.options)
            return f"{choice[1]}={choice[2]}: unknown choice{hint}; choices: {', '.join(error.options)}"
        return text.strip().splitlines()[0]
    unknown = next((e for e in (error, cause) if isinstance(e, ConfigKeyError | ConfigAttributeError)), None)
    if unknown is not None and unknown.parent_node is not None:
        override = re.match(r"Could not override '(.*)'", text)
        file = re.match(r"In '(.*)': ", text)
        known = flatten(OmegaConf.to_container(unknown.parent_node._get_root(), resolve=False))
        line = unknown_key(override[1] if override else str(unknown.full_key), known)
        return f"{file[1]}.yaml: {line}" if file else line
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        reason = str(cause).splitlines()[0]
        text = f"{text.removeprefix('Error merging override ')}: {reason}" if str(error) else reason
    return " ".join(text.split()) or type(error).__name__


# Registered with Hydra.


def _run_name(*, _root_: DictConfig) -> str:
    """The name of a run: the user's own primary file, the experiment and the model that the command chooses."""
    # A job gets the configuration without Hydra's node.
    hydra: Any = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    choices = hydra.runtime.choices
    words = [hydra.job.config_name if hydra.job.config_name != "train" else None, choices.get("experiment")]
    return "_".join(filter(None, [*words, choices.model])).replace("/", "-")


OmegaConf.register_new_resolver("run_name", _run_name, replace=True)
OmegaConf.register_new_resolver("expanduser", os.path.expanduser, replace=True)
_store = ConfigStore.instance()
_store.store(group="schema", name="config", node=Config)
for _group, _choices in SCHEMAS.items():
    # A file of configs/ names its dataclass as /schema/<group>/<name>.
    for _choice, _node in _choices.items():
        _store.store(group=f"schema/{_group}", name=_choice, node=_node)
