"""Custom models, tasks, optimizers and schedules: a configuration names them as ``_target_`` and their keyword
arguments as ``args``."""

import pkgutil
import sys
import traceback
from collections.abc import Callable
from typing import Any

from omegaconf import OmegaConf

from .errors import UserError


def call_target(key: str, config: Any, *arguments: Any, **given: Any) -> Any:
    """Call ``config._target_(*arguments, **given, **config.args)``; ``config`` is cfg.<key>.

    Raises:
        UserError: the target cannot be imported, does not take these arguments, or fails.
    """
    where = f"{key}._target_={config._target_}"
    target = import_target(where, config._target_)
    # Plain values: the target must not keep parts of the configuration.
    args: Any = OmegaConf.to_container(config.args, resolve=True)
    return explained(f"{where}, {key}.args={args}", target, lambda: target(*arguments, **given | args))


def explained(what: str, target: Any, call: Callable[[], Any], hint: str = "") -> Any:
    """Return ``call()``; turn an exception into a UserError: ``what``, the line in the file of ``target``, ``hint``."""
    try:
        return call()
    except UserError:
        raise
    except Exception as error:
        file = getattr(sys.modules.get(getattr(target, "__module__", "")), "__file__", "")
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        place = f" ({file}, line {lines[-1]})" if lines else ""
        raise UserError(" ".join(f"{what}: {type(error).__name__}: {error}{place}{hint}".split())) from error


def import_target(what: str, path: str) -> Callable[..., Any]:
    """The class or function ``path`` (module.Name). Raises UserError, beginning with ``what``, if there is none."""
    hint = "; write module.Name, with the module's folder in PYTHONPATH"
    target = explained(what, None, lambda: pkgutil.resolve_name(path), hint)
    if not callable(target):
        raise UserError(f"{what}: not a class or function{hint}")
    return target
