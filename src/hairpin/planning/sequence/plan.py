"""A plan for one long sequence: how it is dealt to ranks and how its attention crosses them."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.comm.topology import Topology
from hairpin.comm.verbs import Grad, global_mean
from hairpin.errors import MemoryBudgetError, SequenceError
from hairpin.exchange.api import attention
from hairpin.exchange.linear import linear_attention
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Kind, Order
from hairpin.exchange.split import Schedule, SequenceSplit
from hairpin.exchange.stream import put_together, take
from hairpin.planning.sequence.cost import Candidate, candidates, explain, fewest_turns
from hairpin.planning.sequence.memory import Way, held_bytes
from hairpin.planning.sequence.work import AttentionShape
from hairpin.units import format_bytes, parse_bytes

Method = Literal[
    "auto", "ring", "double_ring", "all_gather", "hierarchical", "rsa", "ulysses", "usp", "linear"
]
IGNORED = -100  # label of a token that has none, as everywhere in PyTorch
_log = logging.getLogger(__name__)
_TOKENS = ("input_ids", "tokens", "inputs_embeds")


@dataclass(frozen=True)
class SequencePlan:
    """How one sequence is split over one mesh axis. Made by :func:`plan_sequence`.

    Attributes:
        split: which positions each rank holds, and how attention crosses the ranks.
        mask: which keys a query sees.
        candidates: what each method would cost, the fastest first; none where one was asked for.
    """

    split: SequenceSplit
    mask: Mask
    candidates: tuple[Candidate, ...] = ()
    _notes: dict[str, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def length(self) -> int:
        """Positions of the whole sequence."""
        return self.split.order.length

    @property
    def positions(self) -> Tensor:
        """Global positions that this rank holds, int64 ``[s]``."""
        return self.split.positions

    def with_length(self, length: int, documents: tuple[int, ...] | None = None) -> "SequencePlan":
        """The same plan for another length, or for other documents."""
        mask = replace(self.mask, documents=documents)
        kind: Kind = self.split.order.kind
        if kind == "documents" and documents is None:
            kind = "zigzag"
        order = Order(kind, length, documents if kind == "documents" else None)
        return SequencePlan(replace(self.split, order=order), mask, self.candidates)

    def shard(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """This rank's part of a batch that every rank holds whole. Sends nothing.

        Every tensor ``[b, s, ...]`` is cut along s. ``labels`` are shifted first, so that position
        i holds the token after it, within its document; positions without one get -100. They come
        back as ``shift_labels``. ``position_ids`` are added: from 0 in every document.

        Args:
            batch: tensors by name, among them ``input_ids`` (or ``tokens`` or ``inputs_embeds``).

        Raises:
            SequenceError: no tokens, a tensor of another length, or a name that is made here.
        """
        tokens = next((batch[name] for name in _TOKENS if name in batch), None)
        if tokens is None:
            raise SequenceError(
                f"the batch has {', '.join(batch) or 'nothing'}; it needs one of "
                f"{', '.join(_TOKENS)}"
            )
        for name in ("shift_labels", "position_ids"):
            if name in batch:
                raise SequenceError(
                    f"the batch has {name!r}, which follows from the plan; leave it out"
                    + (" and give 'labels' as long as the tokens" if "labels" in name else "")
                )
        whole = {name: x for name, x in batch.items() if name != "labels"}
        if "labels" in batch:
            whole["shift_labels"] = self._shifted(batch["labels"])
        for name, x in whole.items():
            self._require_length(name, x)
        part = {name: take(x, self.split, 1) for name, x in whole.items()}
        ids = self._position_ids()[self.positions].to(tokens.device)
        part["position_ids"] = ids.expand(tokens.shape[0], -1)
        return part

    def attention(self, q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None) -> Tensor:
        """:func:`hairpin.attention` under this plan."""
        return attention(q, k, v, self.split, mask=self.mask, bias=bias)

    def linear_attention(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None = None
    ) -> Tensor:
        """:func:`hairpin.linear_attention` under this plan, whose parts must be contiguous.

        Raises:
            SequenceError: the plan's mask has a window, a prefix or blocks: states have none.
        """
        if self.mask != Mask(causal=self.mask.causal, documents=self.mask.documents):
            raise SequenceError(
                f"linear attention with {self.mask}: its states know causality and documents; "
                "leave out window, prefix and blocks"
            )
        return linear_attention(
            q,
            k,
            v,
            log_decay,
            mesh=self.split.mesh,
            axis=self.split.axis,
            causal=self.mask.causal,
            documents=self.mask.documents,
            length=self.length,
        )

    def loss(self, total: Tensor, count: Tensor | float) -> Tensor:
        """The loss over all valid tokens from this rank's sum and count, equal on every rank.

        Ranks may hold different numbers of valid tokens, or none. Average gradients over the mesh
        afterwards, as always (``hp.sync_grads``, DDP or FSDP2).
        """
        return global_mean(total, count, self.split.mesh)

    def gather(self, x: Tensor, *, dim: int = 1, grad: Grad = "replicated") -> Tensor:
        """The whole sequence on every rank, positions in order."""
        return put_together(x, self.split, dim, grad=grad)

    def explain(self) -> str:
        """The plan for people."""
        split = self.split
        ranks = split.mesh.size(split.axis)
        held = [len(split.positions_of(rank)) for rank in range(ranks)]
        lines = [
            f"sequence of {self.length} positions over {ranks} ranks of axis '{split.axis}': "
            f"{split.ring} ring places x {split.heads} heads places"
            + (
                f", {'heads' if split.heads_inside else 'ring'} places adjacent" * (split.heads > 1)
            ),
            f"dealt {split.order.kind}: {min(held)} to {max(held)} positions a rank",
            _crossing(split),
            f"mask: {self.mask}",
        ]
        lines += [f"{model}: {note}" for model, note in self._notes.items()]
        if self.candidates:
            lines += ["", explain(self.candidates)]
        return "\n".join(lines)

    def noted(self, model: str, unknown: str | None) -> None:
        """Keep for :meth:`explain` whether a model mixes positions nowhere but in attention."""
        if unknown is None:
            self._notes.setdefault(model, "nothing but attention mixes positions")
            return
        note = f"not known whether only attention mixes positions: {unknown}"
        if self._notes.get(model) != note:
            _log.warning("%s: %s", model, note)
        self._notes[model] = note

    def _require_length(self, name: str, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.length:
            longer = (
                f", or plan with length={x.shape[1]}" if name in _TOKENS and x.dim() > 1 else ""
            )
            raise SequenceError(
                f"batch[{name!r}] has shape {tuple(x.shape)}; give [b, {self.length}, ...]{longer},"
                " or leave it out and pass it beside the part"
            )

    def _shifted(self, labels: Tensor) -> Tensor:
        """The label of the next position; -100 at the end of each document."""
        if labels.dim() != 2 or labels.shape[1] != self.length:
            raise SequenceError(
                f"labels have shape {tuple(labels.shape)}; give one per token, [b, {self.length}], "
                "not shifted"
            )
        shifted = torch.full_like(labels, IGNORED)
        shifted[:, :-1] = labels[:, 1:]
        ends = torch.tensor(list(accumulate(self.mask.documents or ())), dtype=torch.long)
        ends = ends[ends > 0]
        shifted[:, ends.to(labels.device) - 1] = IGNORED
        return shifted

    def _position_ids(self) -> Tensor:
        if self.mask.documents is None:
            return torch.arange(self.length)
        return torch.cat([torch.arange(n) for n in (0, *self.mask.documents)])


def plan_sequence(
    mesh: Mesh | DeviceMesh,
    *,
    length: int | None = None,
    mask: Mask | None = None,
    axis: str = "sp",
    method: Method = "ring",
    heads_degree: int | None = None,
    order: Kind | None = None,
    inner: int | None = None,
    heads_inside: bool = True,
    shape: AttentionShape | None = None,
    topology: Topology | None = None,
    memory: int | str | None = None,
    turns: int | None = None,
) -> SequencePlan:
    """Plan the split of one long sequence over the ranks of a mesh axis.

    Args:
        mesh: live, or a description.
        length: positions of the whole sequence; it need not divide.
        mask: which keys a query sees; all if left out.
        axis: of the mesh.
        method: ``"ring"`` (Liu et al. 2023), ``"double_ring"``, ``"all_gather"`` (of keys and
            values), ``"hierarchical"``, ``"ulysses"`` (Jacobs et al. 2023), ``"usp"`` (Fang and
            Zhao 2024), ``"rsa"`` (Li et al. 2021), ``"linear"`` for linear attention, or
            ``"auto"``: the fastest for ``shape`` on ``topology``.
        heads_degree: of USP: ranks that share out the heads; the largest proper divisor of the
            ranks if left out.
        order: how positions are dealt; if left out, the one that balances the mask's work.
        inner: of double ring and hierarchical: the size of the inner groups.
        heads_inside: of USP: whether the ranks that share out heads are neighbours.
        shape: one attention layer, for ``"auto"`` and for ``memory``; it brings length and mask.
        topology: of ``"auto"``: the ranks' links, from ``hp.Topology.measure`` or by hand.
        memory: bytes, or text such as ``"2GiB"``, that a rank may hold for a layer, forward and
            backward. A method that holds more takes turns.
        turns: rounds in which keys and values cross the ranks, heads by heads: what passes by
            takes so much less room, in so many more messages. If left out, the fewest that fit
            ``memory``, or 1.

    Raises:
        MemoryBudgetError: the method, or with ``"auto"`` any, cannot hold as little as ``memory``.
        SequenceError: degrees that do not divide, or a method that does not exist.
        MeshError: no such axis.
    """
    mesh = as_mesh(mesh)
    if method not in get_args(Method):
        raise SequenceError(f"method {method!r}: write one of {', '.join(get_args(Method))}")
    if method == "auto":
        if turns is not None:
            raise SequenceError(f"turns={turns}: method 'auto' chooses them; leave turns out")
        return _fastest(mesh, axis, shape=shape, topology=topology, memory=memory)
    if topology is not None or (shape is None) != (memory is None):
        raise SequenceError(
            "topology chooses a method: give method='auto'; memory chooses turns, for a shape: "
            "give shape=hp.AttentionShape(...) and memory=..., or method='auto'"
        )
    if shape is not None:
        length, mask = shape.length, shape.mask
    if length is None:
        raise SequenceError(f"method {method!r} needs length=..., the positions of the sequence")
    mask = Mask() if mask is None else mask
    ranks = mesh.size(axis)
    heads = _heads_degree(method, ranks, heads_degree)
    schedule = cast("Schedule", method) if method in get_args(Schedule) else "ring"
    kind = _order(mask, ring=ranks // heads, method=method) if order is None else order
    if method == "linear" and kind != "contiguous":
        raise SequenceError(
            f"method 'linear' with order={kind!r}: states pass from one part to the next, so the "
            "parts are contiguous; leave order out"
        )
    documents = mask.documents if kind == "documents" else None
    if inner is None:
        two_levels = schedule in ("double_ring", "hierarchical")
        inner = _largest_divisor(ranks // heads) if two_levels else 1
    split = SequenceSplit(
        mesh,
        axis,
        Order(kind, length, documents),
        heads=heads,
        schedule=schedule,
        heads_inside=heads_inside,
        inner=inner,
        turns=1 if turns is None else turns,
    )
    mask.require_length(length, length)
    if turns is None and shape is not None and memory is not None:
        split = replace(split, turns=_turns(split, shape, memory))
    return SequencePlan(split, mask)


def _turns(split: SequenceSplit, shape: AttentionShape, memory: int | str) -> int:
    """The fewest turns that a rank can hold."""
    way = Way(
        heads=split.heads,
        places=split.ring,
        schedule=split.schedule,
        inner=split.inner,
        order=split.order.kind,
        turns=1,
    )
    turns = fewest_turns(shape, way, parse_bytes(memory))
    if turns is None:
        raise MemoryBudgetError(
            f"this method does not hold one attention layer in {memory}, in however many turns: "
            f"one turn needs {format_bytes(held_bytes(shape, way))} a rank; allow more memory, "
            "or split over more ranks"
        )
    return turns


def _fastest(
    mesh: Mesh,
    axis: str,
    *,
    shape: AttentionShape | None,
    topology: Topology | None,
    memory: int | str | None,
) -> SequencePlan:
    """The fastest of all methods that a rank can hold."""
    if shape is None or topology is None:
        raise SequenceError(
            "method 'auto' weighs work against links: give shape=hp.AttentionShape(length=..., "
            "heads=..., head_dim=...) and topology=hp.Topology.measure(mesh, axis)"
        )
    if topology.ranks != mesh.size(axis):
        raise SequenceError(
            f"the topology is of {topology.ranks} ranks and axis {axis!r} has {mesh.size(axis)}; "
            "measure it on this axis"
        )
    most = None if memory is None else parse_bytes(memory)
    found = tuple(candidates(shape, topology, memory_bytes=most))
    best = found[0]
    if best.excluded is not None:
        least = min(c.peak_bytes for c in found if c.peak_bytes)
        raise MemoryBudgetError(
            f"no method holds one attention layer in {memory}: the least needs "
            f"{format_bytes(least)} a rank; allow more memory, or split over more ranks"
        )
    return SequencePlan(split_of(best, mesh, axis, shape), shape.mask, found)


def split_of(candidate: Candidate, mesh: Mesh, axis: str, shape: AttentionShape) -> SequenceSplit:
    """The split that a candidate stands for."""
    documents = shape.mask.documents if candidate.order == "documents" else None
    return SequenceSplit(
        mesh,
        axis,
        Order(candidate.order, shape.length, documents),
        heads=candidate.heads,
        schedule=candidate.schedule,
        heads_inside=candidate.heads_inside,
        inner=candidate.inner,
        turns=candidate.turns,
    )


def _crossing(split: SequenceSplit) -> str:
    """How keys cross the ranks, for people."""
    if split.ring == 1:
        return "keys stay"
    return f"keys cross by {split.schedule}" + f" in {split.turns} turns" * (split.turns > 1)


def _heads_degree(method: Method, ranks: int, asked: int | None) -> int:
    if method == "usp":
        return _largest_divisor(ranks) if asked is None else asked
    degree = ranks if method == "ulysses" else 1
    if asked not in (None, degree):
        raise SequenceError(
            f"method {method!r} over {ranks} ranks has heads_degree={degree}, got {asked}; leave "
            "it out, or use method='usp'"
        )
    return degree


def _largest_divisor(n: int) -> int:
    """The largest divisor below n that is no larger than its partner's square; 1 for a prime."""
    return max((d for d in range(1, n) if n % d == 0), default=1)


def _order(mask: Mask, *, ring: int, method: Method) -> Kind:
    """The order that balances the work of a mask."""
    if ring == 1 or method in ("linear", "rsa") or not mask.causal:
        return "contiguous"
    return "zigzag" if mask.documents is None else "documents"
