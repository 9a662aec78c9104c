"""The reference as `help` shows it: options spelled out, and `Example:` as code."""

import importlib
import inspect
import re
from typing import Any

import griffe


OPTIONS = re.compile(r"^\s*\*\*(options|settings|call): ", re.MULTILINE)


class Examples(griffe.Extension):
    """Spells out options, and renames the section `Example:`."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        """Called for each object that has been read."""
        if isinstance(obj, griffe.Function) and takes_options(obj):
            found = inspect.signature(real(obj)).parameters
            kept = [parameter(p) for name, p in found.items() if name != "parent"]
            obj.parameters = griffe.Parameters(*kept)
        if obj.docstring:
            text = obj.docstring.value
            if OPTIONS.search(text) and not obj.path.startswith("jbn.tools."):
                text = inspect.getdoc(real(obj)) or ""
            # A section of this name is shown as code.
            obj.docstring.value = re.sub(
                r"^Example:$", "Examples:", text, flags=re.MULTILINE
            )


def takes_options(function: griffe.Function) -> bool:
    """Whether its options are those that `jbn.options` declares."""
    options = any(
        p.name in ("options", "settings", "call") for p in function.parameters
    )
    return options and not function.path.startswith("jbn.tools.")


def real(obj: griffe.Object) -> Any:
    """The object itself, imported."""
    found: Any = importlib.import_module(obj.module.path)
    for name in obj.path.removeprefix(f"{obj.module.path}.").split("."):
        found = getattr(found, name)
    return found


def parameter(p: inspect.Parameter) -> griffe.Parameter:
    """A parameter as the reference shows it."""
    return griffe.Parameter(
        p.name,
        kind=griffe.ParameterKind(p.kind.description),
        annotation=inspect.formatannotation(p.annotation),
        default=None if p.default is p.empty else default(p.default),
    )


def default(value: Any) -> str:
    """A default as code."""
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    return name if name else repr(value)
