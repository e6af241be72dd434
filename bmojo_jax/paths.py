"""Names of the arrays of a tree ("groups/0/mixer/in_proj/kernel") and rules over these names.

A rule is a (regular expression, value) pair; the expression must match the whole path. Optimizer
and placement are both decided by rules, and both refuse a path that no rule covers, so a new
parameter cannot slip through unnoticed.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax


def path_of(key_path: Sequence[Any]) -> str:
    """The name of a leaf whose jax.tree_util key path is given."""
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def flatten_paths(tree: Any) -> dict[str, Any]:
    """Every leaf of a tree by its path, in the tree's order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_of(key_path): leaf for key_path, leaf in leaves}


def first_match[T](rules: Sequence[tuple[str, T]], path: str) -> T:
    """The value of the first rule that matches.

    Raises:
      ValueError: none does.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise ValueError(f"{path!r} matches none of {[pattern for pattern, _ in rules]}")


def only_match[T](rules: Sequence[tuple[str, T]], path: str) -> T:
    """The value of the one rule that matches.

    Raises:
      ValueError: none does, or several do.
    """
    found = [(pattern, value) for pattern, value in rules if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(
            f"{path!r} must match exactly one rule; it matches {[p for p, _ in found]} "
            f"of {[pattern for pattern, _ in rules]}"
        )
    return found[0][1]
