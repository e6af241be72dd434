"""How often the branches of a Pallas kernel run: every step of its grid is gone through.

A kernel's conditions (`pl.when`) depend on the step, and on operands that are known before the
program runs, such as splash attention's map of blocks. Nothing else of the kernel is evaluated.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

_CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


class Kernel(NamedTuple):
    """A kernel's call in a program. Of each of its conditions, in the order of the program, at what
    share of the grid's steps it holds; one within another follows it, and holds where both do."""

    eqn: Any
    shares: tuple[float, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        return self.eqn.params["grid_mapping"].grid


def kernels(function: Callable[..., Any], *arguments: Any) -> list[Kernel]:
    """Those that it calls, of arguments that are not known."""
    jaxpr = jax.make_jaxpr(function)(*arguments)
    calls = _walk(jaxpr, jaxpr.consts, [None] * len(jaxpr.invars), {"pallas_call"})
    return [Kernel(eqn, _shares(eqn, operands)) for eqn, operands in calls]


def _shares(call: Any, operands: Sequence[Any]) -> tuple[float, ...]:
    jaxpr, mapping = call.params["jaxpr"], call.params["grid_mapping"]
    scalars = operands[: mapping.num_index_operands]
    refs = [*scalars, *[None] * (len(jaxpr.invars) - len(scalars))]

    def holding(jaxpr: Any, refs: Sequence[Any], ids: Sequence[Any]) -> Iterator[Any]:
        for eqn, (index, *operands) in _walk(jaxpr, jaxpr.consts, refs, {"cond"}, ids):
            other, body = eqn.params["branches"]
            if index is None or other.eqns:
                raise ValueError(f"{eqn} must have one branch, and depend on the step alone")
            yield index != 0
            for inner in holding(body, operands, ids):
                yield (index != 0) & inner

    ids = np.indices(mapping.grid, np.int32).reshape(len(mapping.grid), -1)
    every_step = jax.vmap(lambda ids: list(holding(jaxpr, refs, ids)), out_axes=0)
    held = every_step([*ids])
    return tuple(float(np.asarray(at).mean()) for at in held)


def of_branches(shares: Sequence[float], count: int) -> list[float]:
    """Shares of the `count` branches that the compiler has left of these conditions.

    It leaves out what it knows to hold, or not to hold, in all steps. Which of them it left out
    makes no difference, or is an error.
    """
    constant = [i for i, share in enumerate(shares) if share in (0, 1)]
    ways = {
        tuple(share for i, share in enumerate(shares) if i not in gone)
        for gone in itertools.combinations(constant, max(0, len(shares) - count))
    }
    if len(ways) != 1 or len(shares) < count:
        raise ValueError(f"{count=} branches, where conditions hold in these {shares=}")
    return list(ways.pop())


def _walk(
    jaxpr: Any,
    consts: Sequence[Any],
    arguments: Sequence[Any],
    wanted: set[str],
    ids: Sequence[Any] = (),
) -> Iterator[tuple[Any, list[Any]]]:
    """The wanted equations and their operands' values, None where they are not known."""
    values: dict[Any, Any] = {}

    def value(of: Any) -> Any:
        return of.val if isinstance(of, Literal) else values.get(of)

    def run(
        jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]
    ) -> Iterator[tuple[Any, list[Any]]]:
        values.update(zip(jaxpr.constvars, consts, strict=True))
        values.update(zip(jaxpr.invars, arguments, strict=True))
        for eqn in jaxpr.eqns:
            name, operands = eqn.primitive.name, [value(of) for of in eqn.invars]
            if name in wanted:
                yield eqn, operands
            elif name in _CALLS:
                inner = eqn.params[_CALLS[name]]
                yield from run(inner, inner.consts, operands)
                values.update(zip(eqn.outvars, map(value, inner.outvars), strict=True))
            elif name == "program_id" and ids:
                values[eqn.outvars[0]] = ids[eqn.params["axis"]]
            elif name == "get" and operands[0] is not None:
                (indexer,) = jax.tree.unflatten(eqn.params["tree"], operands[1:])
                values[eqn.outvars[0]] = jnp.asarray(operands[0])[indexer.indices]
            elif eqn.outvars and all(operand is not None for operand in operands):
                results = eqn.primitive.bind(*operands, **eqn.params)
                if not eqn.primitive.multiple_results:
                    results = [results]
                values.update(zip(eqn.outvars, results, strict=True))

    yield from run(jaxpr, consts, arguments)
