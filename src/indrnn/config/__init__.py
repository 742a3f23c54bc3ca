"""The configuration: `schema` declares it and imports nothing of the project, `compose` composes it from ``configs/``
with Hydra, `checks` checks the values."""
