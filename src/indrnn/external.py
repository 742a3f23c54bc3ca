"""Custom models, tasks and optimizers: a configuration names them as ``_target_`` and their keyword arguments as
``args``."""

import inspect
import pkgutil
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf

from .errors import UserError


def call_target(key: str, config: Any, *arguments: Any, **given: Any) -> Any:
    """Call ``config._target_(*arguments, **given, **config.args)``.

    Args:
        key: the place of ``config`` in the configuration, for messages: "model", "data" or "optimizer".

    Raises:
        UserError: the target cannot be imported, does not take these arguments, or fails.
    """
    where = f"{key}._target_={config._target_}"
    target = import_target(where, str(config._target_))
    # Plain values: the target must not keep parts of the configuration.
    args: Any = OmegaConf.to_container(config.args, resolve=True) if OmegaConf.is_config(config.args) else config.args
    keywords = given | args
    try:
        inspect.signature(target).bind(*arguments, **keywords)
    except TypeError as error:
        raise UserError(f"{key}.args: {error}; {config._target_} takes {inspect.signature(target)}") from error
    except ValueError:
        pass  # The signature is not known; the call itself fails if it does not fit.
    listed = ", ".join(f"{name}={value}" for name, value in keywords.items()) or "no arguments"
    return explained(f"{where} with {listed}", target, lambda: target(*arguments, **keywords))


def explained(what: str, target: Any, call: Callable[[], Any]) -> Any:
    """Return ``call()``; turn an exception into a UserError with ``what`` and the line in the file of ``target``."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        file = inspect.getsourcefile(target)
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({file}, line {lines[-1]})" if lines else ""
        raise UserError(f"{what}: {_in_words(error)}{place}") from error


def import_target(what: str, path: str) -> Callable[..., Any]:
    """The class or function ``path`` (module.Name). Raises UserError, beginning with ``what``, if there is none."""
    try:
        target = pkgutil.resolve_name(path)
    except ModuleNotFoundError as error:
        hint = "write module.Name, with the module's folder in PYTHONPATH"
        raise UserError(f"{what}: there is no module {error.name}; {hint}") from error
    except Exception as error:
        similar = get_close_matches(getattr(error, "name", None) or "", dir(getattr(error, "obj", None)), n=1)
        hint = f"; did you mean {path.rpartition('.')[0]}.{similar[0]}" if similar else ""
        raise UserError(f"{what}: {_in_words(error)}{hint}") from error
    if not callable(target):
        raise UserError(f"{what}: not a class or function; write module.Name")
    return target


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
