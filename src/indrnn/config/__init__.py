"""The configuration: `schema` declares it and imports nothing of the project, `checks` says what values must satisfy,
`compose` puts it together from ``configs/`` with Hydra."""
