"""What a model is planned on: one call of it, and its Python as it stands while it is looked at."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hairpin.errors import PlanError

Example = tuple[tuple[Any, ...], dict[str, Any]]


def as_example(example: Any) -> Example:
    """An example as (args, kwargs): a tensor, a tuple, a dict, or both.

    Raises:
        PlanError: something else.
    """
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        pair = len(example) == 2 and isinstance(example[0], (tuple, list))
        if pair and isinstance(example[1], Mapping):
            return tuple(example[0]), dict(example[1])
        return tuple(example), {}
    raise PlanError(
        f"example is a {type(example).__name__}; give a tensor, a tuple of arguments, a dict of "
        "keyword arguments, or (args, kwargs)"
    )


@contextmanager
def plainly() -> Iterator[None]:
    """Without compiled blocks and without torch's fused inference path for its own transformers."""
    was_fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.compiler.set_stance("force_eager"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the model warns of, it will warn of when it runs
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fast)
