"""Hairpin: long, multi-dimensional transformers that fit in memory and run fast.

Names are loaded when they are first used, so that ``import hairpin`` is quick and needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hairpin.comm.grads import sync_grads
    from hairpin.comm.halo import halo
    from hairpin.comm.mesh import Mesh, init_mesh
    from hairpin.comm.pending import Pending
    from hairpin.comm.topology import Topology
    from hairpin.comm.verbs import (
        all_reduce,
        gather,
        global_mean,
        reduce_scatter,
        scatter,
        switch,
    )
    from hairpin.errors import HairpinError, MemoryBudgetError
    from hairpin.exchange.api import attention
    from hairpin.exchange.joint import joint_attention
    from hairpin.exchange.linear import linear_attention
    from hairpin.exchange.mask import BlockSparse, Mask
    from hairpin.exchange.order import Order
    from hairpin.exchange.split import SequenceSplit
    from hairpin.layout import Layout
    from hairpin.planning.apply import detach, parallelize, plan_of
    from hairpin.planning.axial.plan import AxialPlan, plan_axial
    from hairpin.planning.fitted import estimate
    from hairpin.planning.make import plan
    from hairpin.planning.plan import Plan
    from hairpin.planning.sequence.plan import SequencePlan, plan_sequence
    from hairpin.planning.sequence.routes import Route
    from hairpin.planning.sequence.work import AttentionShape
    from hairpin.planning.split.seam import Seam
    from hairpin.run.profile import profile
    from hairpin.run.trace import trace

_HOMES = {
    "AttentionShape": "hairpin.planning.sequence.work",
    "AxialPlan": "hairpin.planning.axial.plan",
    "BlockSparse": "hairpin.exchange.mask",
    "HairpinError": "hairpin.errors",
    "Layout": "hairpin.layout",
    "Mask": "hairpin.exchange.mask",
    "MemoryBudgetError": "hairpin.errors",
    "Mesh": "hairpin.comm.mesh",
    "Order": "hairpin.exchange.order",
    "Pending": "hairpin.comm.pending",
    "Plan": "hairpin.planning.plan",
    "Route": "hairpin.planning.sequence.routes",
    "Seam": "hairpin.planning.split.seam",
    "SequencePlan": "hairpin.planning.sequence.plan",
    "SequenceSplit": "hairpin.exchange.split",
    "Topology": "hairpin.comm.topology",
    "all_reduce": "hairpin.comm.verbs",
    "attention": "hairpin.exchange.api",
    "detach": "hairpin.planning.apply",
    "estimate": "hairpin.planning.fitted",
    "gather": "hairpin.comm.verbs",
    "global_mean": "hairpin.comm.verbs",
    "halo": "hairpin.comm.halo",
    "init_mesh": "hairpin.comm.mesh",
    "joint_attention": "hairpin.exchange.joint",
    "linear_attention": "hairpin.exchange.linear",
    "parallelize": "hairpin.planning.apply",
    "plan": "hairpin.planning.make",
    "plan_axial": "hairpin.planning.axial.plan",
    "plan_of": "hairpin.planning.apply",
    "plan_sequence": "hairpin.planning.sequence.plan",
    "profile": "hairpin.run.profile",
    "reduce_scatter": "hairpin.comm.verbs",
    "scatter": "hairpin.comm.verbs",
    "switch": "hairpin.comm.verbs",
    "sync_grads": "hairpin.comm.grads",
    "trace": "hairpin.run.trace",
}

__all__ = [
    "AttentionShape",
    "AxialPlan",
    "BlockSparse",
    "HairpinError",
    "Layout",
    "Mask",
    "MemoryBudgetError",
    "Mesh",
    "Order",
    "Pending",
    "Plan",
    "Route",
    "Seam",
    "SequencePlan",
    "SequenceSplit",
    "Topology",
    "all_reduce",
    "attention",
    "detach",
    "estimate",
    "gather",
    "global_mean",
    "halo",
    "init_mesh",
    "joint_attention",
    "linear_attention",
    "parallelize",
    "plan",
    "plan_axial",
    "plan_of",
    "plan_sequence",
    "profile",
    "reduce_scatter",
    "scatter",
    "switch",
    "sync_grads",
    "trace",
]
__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hairpin' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
