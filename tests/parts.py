"""Parts of a configuration for tests: the values of a file of configs/, some of them changed."""

from functools import cache, partial
from typing import Any

from omegaconf import OmegaConf

from indrnn.config.compose import load_config


def part(group: str, choice: str, **values: Any) -> Any:
    """``cfg.<group>`` of configs/<group>/<choice>.yaml."""
    return OmegaConf.merge(_composed(group, choice), values)


@cache
def _composed(group: str, choice: str) -> Any:
    return getattr(load_config([f"{group}={choice}"]), group)


mnist, mnist5k, adding = (partial(part, "data", name) for name in ("mnist", "mnist5k", "adding"))
