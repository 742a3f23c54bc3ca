"""The text of ``indrnn-train --help``: the choices of every group, and every key with its value and meaning."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..config.compose import Composer

_USAGE = """\
indrnn-train trains one network on one task, evaluates it and records the run.

  indrnn-train                                       the IndRNN, tutorial protocol, full sequential MNIST
  indrnn-train model=lstm seed=1 optimizer.lr=1e-3   key=value sets anything listed below
  indrnn-train experiment=paper_12layer              a named set of values
  indrnn-train -m model=indrnn,lstm seed=0,1,2       one run for each combination
  indrnn-train model=lstm --help                     the same list for another choice

Flags: -m sweep; --cfg job print the configuration, --resolve with references replaced; --config-dir FOLDER more
choices of your own; --version; -sc install=bash tab completion (also zsh, fish); --hydra-help the rest.
Run again, a command goes on where it stopped, and skips what is done."""


def help_text(composer: "Composer", overrides: Sequence[str]) -> str:
    """For the configuration that ``overrides`` compose to. Raises UserError if they do not."""
    from ..config.checks import settings

    cfg = composer.compose(overrides)
    choices = composer.choices()
    width = max(map(len, choices))
    lines = [_USAGE, "", "Choices:"]
    lines += [f"  {group:<{width}} = {', '.join(names)}" for group, names in choices.items()]
    lines += ["", "Keys, with the values of this command:"]
    rows = [(f"{key}={_shown(value)}", field.metadata.get("doc", "")) for key, field, value in settings(cfg)]
    lines += [f"  {setting:<34} {doc}".rstrip() for setting, doc in rows]
    return "\n".join(lines)


def _shown(value: object) -> str:
    """As it would be typed."""
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
