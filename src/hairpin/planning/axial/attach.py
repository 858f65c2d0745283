"""Splitting the stacks of a folding model from outside, and putting them together again.

A stack's forward takes and gives whole tensors. Inside it ``m`` and ``z`` are parts, and a block's
forward takes and gives those. Masks stay whole, and every length is read off them, so a block may
run again later, as activation checkpointing makes it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from hairpin.comm.agree import require_agreement
from hairpin.comm.eager import eager
from hairpin.comm.mesh import Mesh
from hairpin.errors import DisagreementError, PlanError
from hairpin.planning.axial.described import described, random_digest
from hairpin.planning.axial.grid import Grid
from hairpin.planning.axial.msa import arrives_along, evoformer_block
from hairpin.planning.axial.pair import pair_stack
from hairpin.planning.axial.pieces import by_rows
from hairpin.planning.axial.plan import AxialPlan
from hairpin.planning.axial.stacks import (
    evoformer_stacks,
    extra_msas,
    pair_stacks,
    template_attentions,
)
from hairpin.planning.axial.way import Line, Way
from hairpin.planning.hooks import drop_hooks

_EXTRA = ("extra_msa", "extra_has_deletion", "extra_deletion_value")  # features of an extra MSA


@dataclass(frozen=True)
class AxialSplit:
    """A plan on a live mesh: what the split forwards share."""

    plan: AxialPlan
    mesh: Mesh

    def way(self, residues: int, sequences: int = 0) -> Way:
        """How the tensors of one forward lie and move."""
        r = residues
        lengths = {"s": sequences, "r": r, "i": r, "j": r}
        plan = self.plan
        words: dict[str, Any] = {"mesh": self.mesh, "lengths": lengths}
        words |= {"product": plan.product, "passing": plan.passing}
        words |= {"pieces": plan.pieces, "chunks": plan.chunks}
        if isinstance(plan.axis, str):
            return Line(axis=plan.axis, **words)
        return Grid(rows=plan.axis[0], columns=plan.axis[1], **words)


@dataclass(eq=False)
class BeforeModel:
    """Before a forward: make sure that all ranks are about to do the same."""

    split: AxialSplit

    @eager
    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        split = self.split
        alone = all(degree == 1 for degree in split.plan.degrees.values())
        if alone or split.mesh.is_rehearsal:
            return
        words = [
            f"{''.join(map(str, path)) or 'input'}: {described(leaf)}"
            for path, leaf in tree_flatten_with_path((args, kwargs))[0]
            if isinstance(leaf, (Tensor, torch.Generator, bool, int, float, str))
        ]
        mode = "training" if module.training else "eval"
        grad = "grad" if torch.is_grad_enabled() else "no grad"
        statement = f"{'; '.join(words)}; {mode}, {grad}; {split.plan}"
        if module.training or any(getattr(part, "draws", False) for part in module.modules()):
            statement += f"; CPU random state {random_digest(torch.get_rng_state())}"
        _agree(statement, split)


def _agree(statement: str, split: AxialSplit) -> None:
    """Along one axis after the other; who finds a difference first tells it along the next."""
    failure: DisagreementError | None = None
    for axis in split.plan.axes:
        try:
            require_agreement(statement, split.mesh, axis)
        except DisagreementError as error:
            statement, failure = f"{statement}; {error}", failure or error
    if failure is not None:
        raise failure


@dataclass(eq=False)
class _Forward:
    """Stands in for one module's forward; found again by its type."""

    module: Any
    split: AxialSplit


@dataclass(eq=False)
class _ExtraEmbedder(_Forward):
    """Whole features ``[s, r]`` to this rank's part of ``m[s, r, c]``; the stack takes it so."""

    held: str

    @eager
    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        sequences, residues = batch[_EXTRA[0]].shape
        way, module = self.split.way(residues, sequences), self.module
        own = {name: way.part(batch[name], "s r", self.held) for name in _EXTRA}

        def embedded(rows: slice) -> Tensor:
            some = {name: feature[rows] for name, feature in own.items()}
            return type(module).forward(module, {**batch, **some})  # type: ignore[no-any-return]

        return by_rows(embedded, len(own[_EXTRA[0]]), way)


@dataclass(eq=False)
class _EvoformerStack(_Forward):
    """``m[s, r, c], z[i, j, c]`` and whole masks, to the same.

    Attributes:
        takes_part: of ``m``, from what embeds it, and gives None for it.
    """

    takes_part: bool = False

    @eager
    def __call__(
        self, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        blocks, split = self.module.blocks, self.split
        sequences, residues = msa_mask.shape
        way = split.way(residues, sequences)
        if self.takes_part:
            self._check(m, way)
        else:
            m = way.part(m, "s r c", arrives_along(blocks[0]))
        z = way.part(z, "i j c", "j")
        for block in blocks:
            m, z = block(m, z, msa_mask, pair_mask)
        whole = way.whole(z, "i j c", "j")
        if self.takes_part:  # nobody uses it
            return None, whole.wait()
        return way.whole(m, "s r c", "r").wait(), whole.wait()

    def _check(self, m: Tensor, way: Way) -> None:
        held = arrives_along(self.module.blocks[0])
        mine = {dim: way.lengths[dim] for dim in "sr"}
        mine[held] = len(range(way.lengths[held])[way.mine(held)])
        if m.shape[:2] != (mine["s"], mine["r"]):
            raise PlanError(
                f"a stack that is split with what embeds its MSA got m{tuple(m.shape)}, and takes "
                f"this rank's part, {mine['s']} x {mine['r']}; call the whole model, or split the "
                "stack alone: hp.detach the model, then hp.parallelize the stack"
            )


@dataclass(eq=False)
class _EvoformerBlock(_Forward):
    """A block inside a split stack; the last one leaves ``m`` as it is held there."""

    last: bool

    @eager
    def __call__(
        self, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        way = self.split.way(msa_mask.shape[1], msa_mask.shape[0])
        leaves = "r" if self.last else arrives_along(self.module)
        return evoformer_block(self.module, m, z, (msa_mask, pair_mask), way, leaves=leaves)


@dataclass(eq=False)
class _TemplateStack(_Forward):
    """``t[i, j, c]`` and a whole mask, to the same.

    Attributes:
        gives_part: held along i; the whole if not.
    """

    gives_part: bool = False

    @eager
    def __call__(self, t: Tensor, mask: Tensor) -> Tensor:
        blocks, split = self.module.blocks, self.split
        way = split.way(t.shape[0])
        t = way.part(t, "i j c", "i")
        for block in blocks:
            t = block(t, mask)
        t, held = self.module.output_layer_norm(t), _leaves(blocks[-1], split)
        if not self.gives_part:
            return way.whole(t, "i j c", held).wait()
        return t if held == "i" else way.turn(t, "i j c", held, "i").wait()


@dataclass(eq=False)
class _PairStack(_Forward):
    """A block of pairs inside a split stack."""

    arrives: str

    @eager
    def __call__(self, z: Tensor, mask: Tensor) -> Tensor:
        way = self.split.way(mask.shape[0])
        return pair_stack(self.module, z, mask, way, self.arrives)[0]


@dataclass(eq=False)
class _TemplateAttention(_Forward):
    """Pairs ``[i j, 1, c]`` to their templates; ``memory[i j, t, c_t]`` is this rank's part."""

    @eager
    def __call__(self, query: Tensor, mask: Tensor, *, memory: Tensor) -> Tensor:
        r = math.isqrt(len(query))
        way, module = self.split.way(r), self.module
        q = way.part(query.view(r, r, -1), "i j c", "i")
        templates = memory.view(len(q), r, *memory.shape[1:])

        def update(rows: slice) -> Tensor:
            x = q[rows]
            own = templates[rows].flatten(0, 1)
            out = type(module).forward(module, x.flatten(0, 1)[:, None], mask, memory=own)
            return out.view(len(x), r, out.shape[-1])  # type: ignore[no-any-return]

        whole = way.whole(by_rows(update, len(q), way), "i j c", "i").wait()
        return whole.flatten(0, 1)[:, None]


def _leaves(stack: Any, split: AxialSplit) -> str:
    """How pairs are held after a block of them."""
    kind = Line if isinstance(split.plan.axis, str) else Grid
    return kind.multiplied if stack.attention_first else "j"


def attach_axial(model: nn.Module, split: AxialSplit) -> nn.Module:
    """Split every stack of ``model``, and the attention of pairs to their templates.

    Raises:
        PlanError: it has none.
    """
    stand_ins = _stand_ins(model, split)
    if not stand_ins:
        raise PlanError(
            f"{type(model).__name__} has no stack of Evoformer blocks or of pair blocks; give an "
            "AlphaFold, or a stack of one"
        )
    for stand_in in stand_ins:
        stand_in.module.__dict__["forward"] = stand_in
    model.register_forward_pre_hook(BeforeModel(split), with_kwargs=True, prepend=True)
    return model


def detach_axial(model: nn.Module) -> AxialPlan | None:
    """Give every stack its own forward back; the plan, or None if there was none.

    Raises:
        PlanError: what was split is larger, and its parts hand on tensors that fit each other.
    """
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    stand_ins = [forward for forward in forwards if isinstance(forward, _Forward)]
    if not stand_ins:
        return None
    hooks = [h for m in model.modules() for h in m._forward_pre_hooks.values()]
    roots = {id(hook.split) for hook in hooks if isinstance(hook, BeforeModel)}
    if any(id(stand_in.split) not in roots for stand_in in stand_ins):
        raise PlanError(
            f"this {type(model).__name__} was split as a part of a larger model; hp.detach the "
            "module that was given to hp.parallelize"
        )
    for module in model.modules():
        drop_hooks(module, lambda hook: isinstance(hook, BeforeModel))
    for stand_in in stand_ins:
        del stand_in.module.__dict__["forward"]
    return stand_ins[0].split.plan


def axial_plan_of(model: nn.Module) -> AxialPlan | None:
    """The axial plan that a model, or any stack in it, carries, or None."""
    forwards = (module.__dict__.get("forward") for module in model.modules())
    return next((f.split.plan for f in forwards if isinstance(f, _Forward)), None)


def _stand_ins(model: nn.Module, split: AxialSplit) -> list[_Forward]:
    """What stacks and their blocks are to run instead of their forwards."""
    found: list[_Forward] = []
    extra = extra_msas(model)
    for embedder, stack in extra:
        found.append(_ExtraEmbedder(embedder, split, arrives_along(stack.blocks[0])))
    for stack in evoformer_stacks(model):
        takes_part = any(stack is one for _, one in extra)
        found.append(_EvoformerStack(stack, split, takes_part))
        found += [_EvoformerBlock(b, split, last=b is stack.blocks[-1]) for b in stack.blocks]
    attended = template_attentions(model)
    for stack in pair_stacks(model):
        gives_part = any(stack is one for one, _ in attended)
        found.append(_TemplateStack(stack, split, gives_part))
        arrives = ["i", *(_leaves(block, split) for block in stack.blocks)]
        found += [
            _PairStack(b, split, held) for b, held in zip(stack.blocks, arrives, strict=False)
        ]
    found += [_TemplateAttention(attention, split) for _, attention in attended]
    return found
