"""What is measured of axial parallelism: an Evoformer block, or parts of it, split in some way.

A way runs live, on a rank's parts of random inputs, or is rehearsed on shapes, which tells exactly
what a rank sends, computes and holds, of any number of ranks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor, nn

from hairpin.bench.axial_peers import TensorParallel, fastfold_block
from hairpin.bench.links import at_once, none
from hairpin.comm.mesh import Mesh
from hairpin.comm.rehearsal import RehearsalMesh, Sent
from hairpin.comm.rehearsal import Work as Done
from hairpin.comm.transport import Link
from hairpin.models.alphafold import presets
from hairpin.models.alphafold.evoformer import EvoformerBlock
from hairpin.planning.axial.choose import Manner
from hairpin.planning.axial.cost import Rehearsed, rehearse
from hairpin.planning.axial.msa import evoformer_block
from hairpin.planning.axial.pair import _PRODUCTS, _multiply
from hairpin.planning.axial.way import Line

AXIS = "sp"

Masks = tuple[Tensor, Tensor]
Outputs = Sequence[Tensor]
Run = Callable[[Any, Sequence[Tensor], Masks, Line], Outputs]
Links = Literal["as they are", "at once", "none"]


@dataclass(frozen=True)
class Size:
    """Lengths and widths: ``m[s, r, c_m]``, ``z[r, r, c_z]``, operands of products ``c``."""

    sequences: int = 64
    residues: int = 128
    c_m: int = 256
    c_z: int = 128
    c: int = 128

    @property
    def lengths(self) -> dict[str, int]:
        """Of every dim that may be split."""
        return {"s": self.sequences, **dict.fromkeys("rij", self.residues)}


@dataclass(frozen=True)
class Method:
    """One way to run a block or a part of it.

    Attributes:
        inputs: of each the dims, such as ``"s r c_m"``, and the one it is held along, or None.
        run: of a block, those inputs, masks and a way; gives as many outputs.
    """

    name: str
    inputs: tuple[tuple[str, str | None], ...]
    run: Run
    manner: Manner = field(default_factory=Manner)

    def way(self, mesh: Mesh, size: Size) -> Line:
        """How its tensors move."""
        m = self.manner
        return Line(
            mesh=mesh,
            axis=AXIS,
            lengths=size.lengths,
            product=m.product,
            passing=m.passing,
            pieces=m.pieces,
            chunks=m.chunks,
        )

    def shapes(self, way: Line, size: Size) -> list[tuple[int, ...]]:
        """Of this rank's parts of the inputs, then of both masks."""
        found = []
        for dims, held in self.inputs:
            lengths = {d: vars(size)[d] if d[0] == "c" else way.lengths[d] for d in dims.split()}
            if held is not None:
                mine = way.mine(held)
                lengths[held] = mine.stop - mine.start
            found.append(tuple(lengths.values()))
        s, r = size.sequences, size.residues
        return [*found, (s, r), (r, r)]


def build_block(config: Any = None, **where: Any) -> EvoformerBlock:
    """A block of model 1 without dropout, its parameters random where they would start as 0."""
    torch.manual_seed(0)
    with torch.device(where.get("device", "cpu")):
        block = EvoformerBlock(presets.model_1().evoformer if config is None else config)
    for parameter in block.parameters():
        if parameter.device.type != "meta":
            nn.init.normal_(parameter, std=0.1)
    return block.eval()


# ------------------------------------------------------------------------------------- the ways


def _block(block: Any, inputs: Sequence[Tensor], masks: Masks, way: Line) -> Outputs:
    m, z = inputs
    return evoformer_block(block, m, z, masks, way, leaves="s")


def _fastfold(block: Any, inputs: Sequence[Tensor], masks: Masks, way: Line) -> Outputs:
    return fastfold_block(block, inputs[0], inputs[1], masks, way)


def _pair(block: Any, inputs: Sequence[Tensor], masks: Masks, way: Line) -> Outputs:
    return (_multiply(block.pair_stack, inputs[0], masks[1], way),)


def _products(block: Any, inputs: Sequence[Tensor], masks: Masks, way: Line) -> Outputs:
    del masks
    a, b = inputs
    stack = block.pair_stack
    for update in (stack.triangle_multiplication_outgoing, stack.triangle_multiplication_incoming):
        a = _PRODUCTS[way.product](update.product, a, b, way).wait()
    return (a,)


def ours(manner: Manner) -> Method:
    """Our block, split in one manner."""
    return Method(words(manner), (("s r c_m", "s"), ("i j c_z", "j")), _block, manner)


def words(manner: Manner) -> str:
    """A manner's short name, such as ``"ring, gather"``."""
    pieces = f", {manner.pieces} pieces" if manner.pieces > 1 else ""
    return f"{manner.product}, {manner.passing}{pieces}"


def fastfold() -> Method:
    """FastFold's order."""
    return Method("FastFold's order", (("s r c_m", "s"), ("i j c_z", "i")), _fastfold)


def tensor_parallel(*, gloo: bool = False) -> Method:
    """Tensor parallelism, over our all-reduce or Gloo's."""

    def run(block: Any, inputs: Sequence[Tensor], masks: Masks, way: Line) -> Outputs:
        return TensorParallel(way, gloo=gloo).block(block, inputs[0], inputs[1], masks)

    return Method("tensor parallel", (("s r c_m", None), ("i j c_z", None)), run)


def triangles(manner: Manner) -> dict[str, Method]:
    """Both triangle products alone, and with their projections, norms and gates."""
    name = words(replace(manner, passing="gather")).replace(", gather", "")
    return {
        "products": Method(name, (("i j c", "i"), ("i j c", "i")), _products, manner),
        "modules": Method(name, (("i j c_z", "i"),), _pair, manner),
    }


# ----------------------------------------------------------------------------------------- live


class Trial:
    """One way on this rank's parts of random inputs, a forward and a backward at a time."""

    def __init__(self, method: Method, block: nn.Module, mesh: Mesh, size: Size) -> None:
        self.method, self.block = method, block
        self.way = method.way(mesh, size)
        *shapes, s_mask, r_mask = method.shapes(self.way, size)
        self.inputs = [torch.randn(shape).requires_grad_() for shape in shapes]
        self.masks = torch.ones(s_mask), torch.ones(r_mask)
        self.out: Outputs = ()
        self.cotangents: list[Tensor] = []

    def forward(self) -> None:
        """Run forward; gradients of the last backward are dropped."""
        self.forget()
        self.out = self.method.run(self.block, self.inputs, self.masks, self.way)

    def backward(self) -> None:
        """Run backward from random gradients."""
        if not self.cotangents:
            self.cotangents = [torch.randn(x.shape) for x in self.out]
        torch.autograd.backward(list(self.out), self.cotangents)
        self.out = ()

    def forget(self) -> None:
        """Drop all gradients."""
        for x in (*self.inputs, *self.block.parameters()):
            x.grad = None


@contextmanager
def linked(links: Links) -> Iterator[None]:
    """In this context transfers are made as they are, awaited where they start, or not made."""
    if links == "as they are":
        yield
        return
    with patch.object(Link, "exchange", at_once if links == "at once" else none):
        yield


# ------------------------------------------------------------------------------------ rehearsed


@dataclass(frozen=True)
class Rehearsal:
    """One rank's run: of its forward, of its backward if it has one, and the most that it holds."""

    forward: Rehearsed
    backward: Rehearsed | None
    peak_bytes: int

    @property
    def parts(self) -> dict[str, Rehearsed]:
        """By name."""
        found = {"forward": self.forward}
        return found if self.backward is None else {**found, "backward": self.backward}

    @property
    def sent_bytes(self) -> int:
        """In both."""
        return sum(part.sent_bytes for part in self.parts.values())

    @property
    def done(self) -> Done:
        """Work of both."""
        parts = self.parts.values()
        return Done(sum(p.done.flops for p in parts), sum(p.done.touched_bytes for p in parts))


class _Rehearsing(nn.Module):
    """A block that notes where its forward ends."""

    def __init__(self, block: nn.Module, method: Method, mesh: RehearsalMesh, size: Size) -> None:
        super().__init__()
        self.block, self.method, self.mesh = block, method, mesh
        self.way = method.way(mesh, size)
        self.ended = 0, Done()

    def forward(self, *tensors: Tensor) -> Outputs:
        *inputs, msa_mask, pair_mask = tensors
        out = self.method.run(self.block, inputs, (msa_mask, pair_mask), self.way)
        self.ended = len(self.mesh.sent), self.mesh.work()
        return out


def rehearsed(
    method: Method,
    size: Size,
    degree: int,
    *,
    rank: int = 0,
    backward: bool = True,
    block: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rehearsal:
    """What one rank of ``degree`` sends, computes and holds; inputs have gradients too."""
    mesh = RehearsalMesh(rank, **{AXIS: degree})
    block = build_block(device="meta") if block is None else block
    module = _Rehearsing(block.to(dtype), method, mesh, size)
    args = [
        torch.empty(shape, dtype=dtype, device="meta") for shape in method.shapes(module.way, size)
    ]
    for x in args[:-2]:
        x.requires_grad_(backward)
    run = rehearse(module, args, mesh, backward=backward)
    count, done = module.ended
    forward = Rehearsed(run.sent[:count], run.peak_bytes, done)
    if not backward:
        return Rehearsal(forward, None, run.peak_bytes)
    later = tuple(_after(sent, done) for sent in run.sent[count:])
    return Rehearsal(
        forward, Rehearsed(later, run.peak_bytes, _less(run.done, done)), run.peak_bytes
    )


def _after(sent: Sent, done: Done) -> Sent:
    awaited = None if sent.awaited is None else _less(sent.awaited, done)
    return replace(sent, started=_less(sent.started, done), awaited=awaited)


def _less(work: Done, done: Done) -> Done:
    return Done(work.flops - done.flops, work.touched_bytes - done.touched_bytes)
