"""Parses the command line into a flat dataclass, with help in groups."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_type_hints

import docstring_parser
import tyro


T = TypeVar("T")


def parse(
    default: T,
    groups: Mapping[str, Sequence[str]],
    args: Sequence[str],
    *,
    prog: str | None = None,
) -> T:
    """Reads flags.

    Args:
        default: A dataclass; its docstring becomes the help text.
        groups: Names of fields, by the name of their group in the help. Other fields
            come last, in a group called `more`.
        args: The command line.
        prog: The name of the program, for help.

    Returns:
        A dataclass of the same type.
    """
    fields = [field.name for field in dataclasses.fields(default)]  # type: ignore[arg-type]
    grouped = {name for names in groups.values() for name in names}
    more = [name for name in fields if name not in grouped]
    groups = {**groups, "more": more} if more else groups
    types = {title: _group(type(default), groups[title]) for title in groups}
    nested: Any = dataclasses.make_dataclass("Flags", list(types.items()))
    values = {
        title: types[title](**{name: getattr(default, name) for name in groups[title]})
        for title in groups
    }
    text = docstring_parser.parse(type(default).__doc__ or "")
    found = tyro.cli(
        nested,
        args=args,
        default=nested(**values),
        prog=prog,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff),
        description=f"{text.short_description}\n\n{text.long_description or ''}",
    )
    flat = {
        name: getattr(getattr(found, title), name)
        for title in groups
        for name in groups[title]
    }
    return type(default)(**flat)


def _group(kind: type, names: Sequence[str]) -> Any:
    """A dataclass with some of the fields and their texts."""
    hints = get_type_hints(kind, include_extras=True)
    texts = {
        param.arg_name: param.description or ""
        for param in docstring_parser.parse(kind.__doc__ or "").params
    }
    made = dataclasses.make_dataclass("Group", [(name, hints[name]) for name in names])
    lines = [f"    {name}: {' '.join(texts[name].split())}" for name in names]
    made.__doc__ = "\n".join(["", "", "Attributes:", *lines])
    return made
