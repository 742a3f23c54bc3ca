"""The overrides of a command line, checked before Hydra sees them: Hydra lets ``+key`` add keys that no schema has."""

from collections.abc import Iterable, Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig

from ..errors import UserError
from .schema import SCHEMAS
from .wording import suggest, unknown_key

# Plugins of Hydra that the extra "sweep" installs.
_SWEEP_PLUGINS = {("hydra/launcher", name) for name in ("joblib", "submitit_local", "submitit_slurm")}


def parse_overrides(overrides: Sequence[str], loader: ConfigLoaderImpl, sweep: bool = False) -> list[Override]:
    """Parse ``key=value`` words; with ``sweep``, ``key=value,value`` is allowed.

    Raises:
        UserError: one of them is not an override.
    """
    parser = OverridesParser.create(config_loader=loader)
    parsed: list[Override] = []
    for text in overrides:
        try:
            override = parser.parse_overrides([text])[0]
        except HydraException:
            override = None
        if override is None or not override.key_or_group:
            remedy = "write key=value, and quote values with special characters, as 'key=\"a b\"'"
            raise UserError(f"{text!r} cannot be read: {remedy}")
        if override.is_sweep_override() and not sweep:
            raise UserError(
                f"{text}: several values are a sweep, which needs -m; a list is written [1,2], a text '1,2'"
            )
        parsed.append(override)
    return parsed


def is_group(override: Override, loader: ConfigLoaderImpl) -> bool:
    """Whether it chooses a file, as ``model=lstm`` does, and does not set a value."""
    return "." not in override.key_or_group and loader.repository.group_exists(override.key_or_group)


def is_value(override: Override, loader: ConfigLoaderImpl) -> bool:
    """Whether it sets a key of the project's own, and not a choice or a key of Hydra's."""
    return not (override.is_hydra_override() or is_group(override, loader) or override.package is not None)


def expand_sweep(overrides: Sequence[Override]) -> list[list[str]]:
    """The overrides of every job of ``-m``, in the order in which Hydra's basic sweeper runs them.

    Raises:
        UserError: a range that the basic sweeper cannot enumerate.
    """
    jobs: list[list[str]] = [[]]
    for override in overrides:
        words = [str(override.input_line)]
        if override.is_sweep_override():
            try:
                words = [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]
            except (HydraException, ValueError) as error:
                raise UserError(f"{words[0]}: {str(error).splitlines()[0]}") from error
        jobs = [[*job, word] for job in jobs for word in words]
    return jobs


def check_groups(overrides: Sequence[Override], loader: ConfigLoaderImpl) -> None:
    """Raises:
    UserError: a group is given a choice that has no file, or a word without a dot is neither a group nor a key.
    """
    search = [str(override.input_line) for override in overrides if override.key_or_group == "hydra.searchpath"]
    for override in overrides:
        if not is_group(override, loader):
            continue
        group = override.key_or_group
        if group in SCHEMAS and (override.is_delete() or override.is_add() or override.is_force_add()):
            raise UserError(f"{override.input_line}: there is always one {group}; write {group}=<choice> to pick it")
        if override.is_delete():
            continue
        choices = sorted(loader.get_group_options(group, config_name=None, overrides=search))
        choice = override.value()
        if isinstance(choice, list):
            raise UserError(f"{override.input_line}: take one choice of {group}; choices: {', '.join(choices)}")
        if choice is None and group not in SCHEMAS:
            continue
        if str(choice) not in choices:
            written = "null" if choice is None else str(choice)
            hint = suggest(written, choices)
            if (group, written) in _SWEEP_PLUGINS:
                hint = "; it comes with pip install 'indrnn[sweep]'"
            raise UserError(f"{group}={written}: there is no such choice{hint}; choices: {', '.join(choices)}")


def check_keys(overrides: Iterable[Override], cfg: DictConfig) -> None:
    """Look the key of every value override up in ``cfg``, the configuration that the chosen files compose to.

    Raises:
        UserError: the key does not exist there, or it is to be deleted or added.
    """
    known = dict.fromkeys(leaf_keys(cfg))
    choices = {str(key): str(value) for key, value in cfg.hydra.runtime.choices.items()}
    for override in overrides:
        key = override.key_or_group
        if key not in known and key.split("[")[0] not in known:
            raise UserError(unknown_key(key, [*known, *(group for group in choices if "/" not in group)], choices))
        group, _, name = key.partition(".")
        if name == "name" and group in SCHEMAS and override.value() != cfg[group].name:
            raise UserError(f"{override.input_line}: a name goes with its file; write {group}={override.value()}")
        if override.is_delete():
            raise UserError(f"~{key}: a key cannot be taken away; give it another value")
        if override.is_add():
            raise UserError(f"+{key}: the key exists already; write {str(override.input_line).lstrip('+')}")


def leaf_keys(cfg: DictConfig, prefix: str = "") -> Iterable[str]:
    """The dotted name of every setting, groups left out, and ``hydra``."""
    for key in map(str, cfg):
        if not prefix and key == "hydra":
            continue
        node = cfg._get_node(key)
        if isinstance(node, DictConfig):
            yield from leaf_keys(node, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"
