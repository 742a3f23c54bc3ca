"""The configuration: `schema` declares it and imports nothing from the project, `compose` composes it from ``configs/``
with Hydra and checks it."""
