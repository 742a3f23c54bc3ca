"""Code from outside the package that a configuration names as ``_target_``, imported and called with ``args``."""

import importlib
import inspect
import traceback
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from omegaconf import OmegaConf

from .errors import UserError


def call_target(key: str, config: Any, *arguments: Any, **given: Any) -> Any:
    """Call ``config._target_`` (module.function or module.Class) with ``arguments``, ``given`` and ``config.args``.

    Args:
        key: the place of ``config`` in the configuration, for messages: "model", "data" or "optimizer".

    Raises:
        UserError: the target cannot be imported, does not take these arguments, or fails.
    """
    target = import_target(f"{key}._target_={config._target_}", str(config._target_))
    # Plain values: the target must not keep parts of the configuration.
    args = config.args
    own: Any = OmegaConf.to_container(args, resolve=True) if OmegaConf.is_config(args) else dict(args)
    keywords = given | own
    try:
        inspect.signature(target).bind(*arguments, **keywords)
    except TypeError as error:
        raise UserError(f"{key}.args: {error}; {config._target_} takes {inspect.signature(target)}") from error
    except ValueError:
        pass  # The signature is not known; the call itself will fail if it does not fit.
    listed = ", ".join(f"{name}={value}" for name, value in keywords.items())
    with_arguments = f"{key}._target_={config._target_} with {listed or 'no arguments'}"
    return explained(with_arguments, target, lambda: target(*arguments, **keywords))


def explained(what: str, target: Any, call: Callable[[], Any]) -> Any:
    """Return ``call()``; turn an exception into a UserError that begins with ``what`` and names the line in the file of
    ``target`` where it was raised."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        file = inspect.getsourcefile(target)
        places = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({places[-1].filename}, line {places[-1].lineno})" if places else ""
        raise UserError(f"{what}: {_in_words(error)}{place}") from error


def import_target(what: str, path: str) -> Callable[..., Any]:
    """The class or function ``path`` (module.Name). Raises UserError, beginning with ``what``, if there is none."""
    name, _, attribute = path.rpartition(".")
    if not name:
        raise UserError(f"{what}: write module.Name, for example mymodule.MyClass")
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise UserError(f"{what}: importing {name} failed: {_in_words(error)}") from error
        raise UserError(f"{what}: there is no module {error.name}; add its folder to PYTHONPATH") from error
    except Exception as error:
        raise UserError(f"{what}: importing {name} failed: {_in_words(error)}") from error
    target = getattr(module, attribute, None)
    if not callable(target):
        similar = get_close_matches(attribute, [known for known in vars(module) if callable(vars(module)[known])], n=1)
        hint = f"; did you mean {name}.{similar[0]}" if similar else ""
        raise UserError(f"{what}: {module.__file__ or name} has no class or function {attribute}{hint}")
    return target


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
