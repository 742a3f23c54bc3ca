"""Composition of the configuration from ``configs/`` with Hydra, and Hydra's errors as one line."""

import os
import re
from collections.abc import Iterable
from contextlib import suppress
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
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from ..errors import UserError
from .checks import check, unknown_key
from .schema import SCHEMAS, Config, all_keys

_package = Path(__file__).resolve().parents[1]
# In the package once installed, at the top of a checkout.
CONFIG_DIR = _package / "configs" if (_package / "configs").is_dir() else _package.parents[1] / "configs"


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
