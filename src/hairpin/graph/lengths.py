"""Numbers that depend on lengths: compiled once, evaluated at any lengths in microseconds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true


def hint(size: Any) -> int:
    """The length that a symbolic size had in the example."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def hints(sizes: Iterable[Any]) -> list[int]:
    """The lengths that symbolic sizes had in the example."""
    return [hint(size) for size in sizes]


def expression(size: Any) -> Any:
    """A size as sympy knows it."""
    return size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(int(size))


def symbol(size: Any) -> Any:
    """The symbol that a size is, None for a fixed or composed one."""
    if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
        return size.node.expr
    return None


def is_open(size: Any) -> bool:
    """Whether a size depends on lengths that a trace left open."""
    return isinstance(size, torch.SymInt)


def proved(condition: Any) -> bool:
    """Whether it holds for all lengths that the symbols allow; adds no guard."""
    return bool(statically_known_true(condition))


def alike(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Two shapes, or strides, are equal for all lengths."""
    return len(left) == len(right) and all(
        a is b or proved(a == b) for a, b in zip(left, right, strict=True)
    )


def compiled(sizes: Sequence[Any]) -> Callable[[Mapping[Any, int]], list[int]]:
    """A function from lengths (symbol -> int) to the values of these sizes.

    Args:
        sizes: integers, and symbolic integers of a traced graph.
    """
    expressions = [expression(size) for size in sizes]
    distinct = list(dict.fromkeys(expressions))  # most tensors of a graph have few sizes
    places = {found: place for place, found in enumerate(distinct)}
    order = [places[found] for found in expressions]
    symbols = sorted(set().union(*(e.free_symbols for e in distinct)), key=str)
    function = sympy.lambdify(symbols, distinct, modules=[_functions(), "math"])

    def evaluate(lengths: Mapping[Any, int]) -> list[int]:
        values = [int(value) for value in function(*(lengths[symbol] for symbol in symbols))]
        return [values[place] for place in order]

    return evaluate


def same_size(length: Any, whole: Any, unit: int, whole_unit: int) -> bool:
    """Whether ``length / unit == whole / whole_unit`` at any lengths, not only the example's."""
    mine, theirs = expression(length), expression(whole)
    return bool(sympy.expand(mine * whole_unit - theirs * unit) == 0)


def _functions() -> dict[str, Callable[..., Any]]:
    """What torch's own symbolic functions mean in Python."""
    return {
        "FloorDiv": lambda a, b: a // b,
        "CleanDiv": lambda a, b: a // b,
        "Mod": lambda a, b: a % b,
        "PythonMod": lambda a, b: a % b,
        "ModularIndexing": lambda a, b, c: (a // b) % c,
        "Max": max,
        "Min": min,
        "IntTrueDiv": lambda a, b: a / b,
        "FloatTrueDiv": lambda a, b: a / b,
        "ToFloat": float,
        "TruncToInt": int,
        "FloorToInt": lambda a: int(a // 1),
        "CeilToInt": lambda a: -int(-a // 1),
        "RoundToInt": round,
        "Where": lambda condition, a, b: a if condition else b,
        "PowByNatural": pow,
        "Identity": lambda a: a,
    }
