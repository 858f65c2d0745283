"""Keeping transfers out of compiled code."""

from collections.abc import Callable
from typing import TypeVar, cast

import torch

Function = TypeVar("Function", bound=Callable[..., object])


def eager(function: Function) -> Function:
    """Make torch.compile step around a function: it breaks the graph there and goes on after."""
    return cast(Function, torch.compiler.disable(function))
