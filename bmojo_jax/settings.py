"""Settings: frozen dataclasses of plain values, to and from ConfigDicts and JSON, all checked.

`config.py` declares the settings. Here is what any such dataclass needs: conversion both ways with
every name, type and value checked, so that a mistake is told with the name of the field, its value
and what would be valid.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import ml_collections
from ml_collections import config_dict


def require(valid: bool, field: str, value: object, wanted: str) -> None:
    if not valid:
        raise ValueError(f"{field}={value!r}: must be {wanted}")


def check_literals(prefix: str, config: Any) -> None:
    for field in dataclasses.fields(config):
        _check_literal(f"{prefix}{field.name}", field.type, getattr(config, field.name))


def _check_literal(name: str, annotation: Any, value: Any) -> None:
    """Checks a field annotated as a Literal against its choices."""
    if typing.get_origin(annotation) is Literal:
        choices = typing.get_args(annotation)
        require(value in choices, name, value, f"one of {choices}")


def check_at_least(prefix: str, config: Any, minimum: float | int, names: Sequence[str]) -> None:
    for name in names:
        value = getattr(config, name)
        require(
            isinstance(value, int | float) and math.isfinite(value) and value >= minimum,
            f"{prefix}{name}",
            value,
            f"a number >= {minimum}",
        )


def _plain_type(annotation: Any) -> Any:
    """The type behind an annotation such as `int | None`, `Literal["a", "b"]` or `str`."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return str
    if origin in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return origin or annotation


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """A ConfigDict of a dataclass: what a config file returns and flags override."""
    result = ml_collections.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            result[field.name] = to_config_dict(value)
        elif value is None:
            result[field.name] = config_dict.placeholder(_plain_type(field.type))
        elif isinstance(value, tuple):
            result[field.name] = tuple(
                to_config_dict(item) if dataclasses.is_dataclass(item) else item for item in value
            )
        else:
            result[field.name] = value
    return result.lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values of a dataclass, ready for JSON."""
    return dataclasses.asdict(config)


def names(kind: Any, section: str = "") -> list[str]:
    """The names of all settings of a dataclass, e.g. "model.window"."""
    result = []
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(field.type):
            result += names(field.type, f"{section}{field.name}.")
        else:
            result.append(section + field.name)
    return result


def nearest(name: str, kind: Any) -> str:
    """The setting of `kind` that is most like a name."""

    def similarity(known: str) -> float:
        # Twice the last part, so that a setting is also found under the wrong section.
        whole = difflib.SequenceMatcher(None, name, known)
        last = difflib.SequenceMatcher(None, name.split(".")[-1], known.split(".")[-1])
        return whole.ratio() + last.ratio()

    return max(names(kind), key=similarity)


def unknown(name: str, kind: Any) -> str:
    """What to say of a name that is no setting of `kind`."""
    return f"{name} is not a setting; did you mean {nearest(name, kind)}?"


def from_dict[T](
    kind: type[T], values: Mapping[str, Any], *, section: str = "", root: Any = None
) -> T:
    """Makes the dataclass `kind` of nested plain values, checking every name, type and value.

    Args:
      section: prefixes the names in errors, e.g. "model.".
      root: among whose settings the nearest to an unknown one is looked for; None: `kind`.

    Raises:
      ValueError: a field is unknown (the nearest known one is suggested), of the wrong type, or
        has a bad value.
    """
    root = root or kind
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyrefly: ignore
    arguments = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(unknown(section + name, root))
        arguments[name] = _convert(fields[name].type, value, section + name, root)
    return kind(**arguments)


def _convert(annotation: Any, value: Any, name: str, root: Any) -> Any:
    if dataclasses.is_dataclass(annotation):
        require(isinstance(value, Mapping), name, value, "a section with settings of its own")
        return from_dict(annotation, value, section=f"{name}.", root=root)  # pyrefly: ignore
    optional = type(None) in typing.get_args(annotation)
    plain = _plain_type(annotation)
    if value is None and optional:
        return None
    if plain is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if plain is tuple and isinstance(value, list):
        value = tuple(value)
    right = isinstance(value, plain) and not (plain is int and isinstance(value, bool))
    require(right, name, value, f"of type {plain.__name__}" + (" or None" if optional else ""))
    if plain is tuple:  # tuple[item, ...]
        item = typing.get_args(annotation)[0]
        items = typing.cast(tuple[Any, ...], value)
        return tuple(_convert(item, x, f"{name}[{i}]", root) for i, x in enumerate(items))
    _check_literal(name, annotation, value)
    return value


def plain_values(value: Any) -> Any:
    """A ConfigDict as nested dicts, those within tuples too."""
    if isinstance(value, ml_collections.ConfigDict):
        return {name: plain_values(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(plain_values(item) for item in value)
    return value
