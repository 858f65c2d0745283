"""Hairpin: long, multi-dimensional transformers that fit in memory and run fast.

Names are loaded when they are first used, so that ``import hairpin`` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hairpin.comm.grads import sync_grads
    from hairpin.comm.mesh import Mesh, init_mesh
    from hairpin.comm.pending import Pending
    from hairpin.comm.verbs import (
        all_reduce,
        gather,
        global_mean,
        reduce_scatter,
        scatter,
        switch,
    )
    from hairpin.errors import HairpinError, MemoryBudgetError
    from hairpin.layout import Layout
    from hairpin.planning.apply import detach, parallelize, plan_of
    from hairpin.planning.fitted import estimate
    from hairpin.planning.make import plan
    from hairpin.planning.plan import Plan
    from hairpin.planning.seam import Seam
    from hairpin.run.profile import profile

_HOMES = {
    "HairpinError": "hairpin.errors",
    "Layout": "hairpin.layout",
    "MemoryBudgetError": "hairpin.errors",
    "Mesh": "hairpin.comm.mesh",
    "Pending": "hairpin.comm.pending",
    "Plan": "hairpin.planning.plan",
    "Seam": "hairpin.planning.seam",
    "all_reduce": "hairpin.comm.verbs",
    "detach": "hairpin.planning.apply",
    "estimate": "hairpin.planning.fitted",
    "gather": "hairpin.comm.verbs",
    "global_mean": "hairpin.comm.verbs",
    "init_mesh": "hairpin.comm.mesh",
    "parallelize": "hairpin.planning.apply",
    "plan": "hairpin.planning.make",
    "plan_of": "hairpin.planning.apply",
    "profile": "hairpin.run.profile",
    "reduce_scatter": "hairpin.comm.verbs",
    "scatter": "hairpin.comm.verbs",
    "switch": "hairpin.comm.verbs",
    "sync_grads": "hairpin.comm.grads",
}

__all__ = [
    "HairpinError",
    "Layout",
    "MemoryBudgetError",
    "Mesh",
    "Pending",
    "Plan",
    "Seam",
    "all_reduce",
    "detach",
    "estimate",
    "gather",
    "global_mean",
    "init_mesh",
    "parallelize",
    "plan",
    "plan_of",
    "profile",
    "reduce_scatter",
    "scatter",
    "switch",
    "sync_grads",
]
__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hairpin' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
