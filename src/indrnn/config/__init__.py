"""The configuration: its schema, its checks, and how Hydra composes it from ``configs/``."""

from .schema import Config

__all__ = ["Config"]
