"""Error messages in one line: Hydra's and OmegaConf's put into ours, and suggestions for misspelt words."""

import re
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches

from yaml import MarkedYAMLError  # type: ignore[import-untyped]

from .schema import SCHEMAS, Config

_TYPE_NAMES = {"Integer": "a whole number", "Float": "a number", "Boolean": "true or false"}


def field_names(schema: type) -> list[str]:
    """The keys of a dataclass of the schema."""
    return [field.name for field in fields(schema)]


def suggest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean a or b"`` for the closest known words, or an empty string."""
    # A word with a dot is no group.
    candidates = sorted(key for key in set(known) if "." in key or "." not in word)
    matches = get_close_matches(word, candidates, n=2, cutoff=0.6)
    if not matches:
        # layers -> model.num_layers, lr -> optimizer.lr: the last part alone may be right, or a part of it.
        last = word.rsplit(".", 1)[-1]
        tails = {key.rsplit(".", 1)[-1]: key for key in reversed(candidates)}
        matches = [tails[tail] for tail in get_close_matches(last, tails, n=2, cutoff=0.6)]
    return f"; did you mean {' or '.join(matches)}" if matches else ""


def unknown_key(key: str, known: Iterable[str], choices: dict[str, str]) -> str:
    """One line for a key that the composed configuration lacks.

    Args:
        key: as written, dotted.
        known: all keys of the composed configuration.
        choices: the chosen file of each group, for example ``{"model": "lstm"}``.
    """
    message = f"{key}: there is no such key"
    group, _, name = key.partition(".")
    if f"{group}.args.{name}" in known:
        return f"{message}; did you mean {group}.args.{name}"
    others = [choice for choice, schema in SCHEMAS.get(group, {}).items() if name in field_names(schema)]
    if others:
        return f"{message} with {group}={choices.get(group, '?')}; it belongs to {group}={', '.join(others)}"
    return message + (suggest(key, known) or "; indrnn-train --cfg job lists all")


def one_line(error: BaseException) -> str:
    """What an exception of Hydra, OmegaConf or PyYAML says, without search paths, carets and hints about Hydra."""
    cause: BaseException | None = error
    while cause is not None and not str(cause).strip():
        cause = cause.__cause__
    if isinstance(cause, MarkedYAMLError):
        mark = cause.problem_mark
        where = f"{mark.name}, line {mark.line + 1}: " if mark else ""
        return f"{where}{cause.problem or 'cannot be read as YAML'}"
    text = str(cause or error)
    inner = str(error.__cause__ or "")
    merging = re.match(r"Error merging override (.*)", text)
    if merging:
        return f"{merging[1]}: {type_problem(inner)}"
    in_file = re.match(r"In '(.*)': \w+ raised while composing config:\n(.*)", text, re.DOTALL)
    if in_file:
        return f"{in_file[1]}.yaml: {_file_problem(in_file[2])}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    key = re.search(r"full_key: (\S+)", text) if isinstance(error, OverflowError) else None
    return f"{key[1]}: {lines[0]}" if key else lines[0] if lines else type(error).__name__


def _file_problem(text: str) -> str:
    """What OmegaConf says about a value in a file: its key, then what is wrong with it."""
    key = re.search(r"full_key: (\S+)", text)
    missing = re.match(r"Key '.*' not in '(\w+)'", text)
    if key and key[1] == "experiment":
        return "its first line must be '# @package _global_', so that its keys are those of the whole configuration"
    if key and missing:
        schemas = {(group, schema.__name__): name for group, of in SCHEMAS.items() for name, schema in of.items()}
        chosen = {group: name for (group, schema), name in schemas.items() if schema == missing[1]}
        return unknown_key(key[1], all_keys(), chosen)
    return f"{key[1] + ': ' if key else ''}{type_problem(text)}"


def all_keys() -> list[str]:
    """Every key of every schema, dotted, and the groups."""
    root = [name for name in field_names(Config) if name not in SCHEMAS]
    groups = [
        f"{group}.{name}"
        for group, choices in SCHEMAS.items()
        for schema in choices.values()
        for name in field_names(schema)
    ]
    return list(dict.fromkeys([*root, *SCHEMAS, *groups]))


def type_problem(text: str) -> str:
    """``Value 'x' of type 'str' could not be converted to Float`` and its like, in words."""
    first = text.strip().splitlines()[0] if text.strip() else "not a possible value"
    first = re.sub(r"^While dereferencing interpolation '.*?': ", "", first)
    wrong = re.match(r"Value '(.*)' of type '(\w+)' could not be converted to (\w+)", first)
    if wrong:
        # A reference to a whole group would print all of it.
        value = "a group of keys" if wrong[2] == "DictConfig" else wrong[1]
        return f"{value} is not {_TYPE_NAMES.get(wrong[3], wrong[3])}"
    if "is not Optional" in first:
        return "it must have a value, not null"
    if "is not a ListConfig" in first:
        return "a list is needed, as [1,2]"
    if first.startswith("Cannot convert"):
        return "a text is needed"
    return first
