"""The configuration: its schema, its checks, and how Hydra composes it from ``configs/``."""

from .checks import check, result_keys
from .compose import load_config
from .paths import config_dir
from .schema import Config

__all__ = ["Config", "check", "config_dir", "load_config", "result_keys"]
