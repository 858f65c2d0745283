"""Models and comparisons for the tests of loops: every region of a graph against eager."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hairpin.errors import TraceError
from hairpin.graph.export import Traced, packed_outputs, trace
from hairpin.graph.memory import Flow, flow_of
from hairpin.planning.loops.emit import EmissionError, Region, emit
from hairpin.planning.loops.regions import Candidate, boundaries, candidates

WIDE = torch.float64


@dataclass
class Regions:
    """What came of running a model once with each of its regions as a loop.

    Attributes:
        runs: graphs with one loop that were run.
        faults: what was wrong, in words.
    """

    flow: Flow
    found: int = 0
    runs: int = 0
    faults: list[str] = field(default_factory=list)


def try_regions(
    model: nn.Module,
    args: Sequence[Any],
    *,
    others: Sequence[Sequence[Any]] = (),
    most: int = 200,
    rtol: float = 1e-12,
) -> Regions:
    """Run the graph of a model with every single region as a loop, at several chunk sizes.

    Args:
        others: arguments of other lengths, run with the graph of ``args``.
        most: regions to try, drawn from all.
        rtol: of the largest number.
    """
    traced = trace(model, args, {})
    flow = flow_of(traced.graph)
    marks = list(range(len(flow.steps) + 1)) if len(flow.steps) < 40 else boundaries(flow)
    found = list(candidates(flow, marks))
    result = Regions(flow, len(found))
    if len(found) > most:
        found = random.Random(0).sample(found, most)
    with torch.no_grad():
        expected = [tree_leaves(model(*given)) for given in (args, *others)]
    for candidate in found:
        for fault in _faults(
            traced, flow, candidate, model, (args, *others), expected, rtol, result
        ):
            result.faults.append(f"{candidate.start}..{candidate.end} {candidate.seed}: {fault}")
    return result


def _faults(
    traced: Traced,
    flow: Flow,
    candidate: Candidate,
    model: nn.Module,
    calls: Sequence[Sequence[Any]],
    expected: Sequence[Sequence[Any]],
    rtol: float,
    result: Regions,
) -> Iterator[str]:
    try:
        emitted = emit(flow, [Region(candidate.start, candidate.end, candidate.seed)])
    except EmissionError:
        return  # refused, not wrong
    for number, (given, wanted) in enumerate(zip(calls, expected, strict=True)):
        if number and emitted.bound:
            return  # a program writes such a region again for other lengths
        for chunk in (2, 3) if number else chunk_sizes(candidate.units):
            try:
                before = traced.flat_inputs(model, model.forward, given, {})
            except TraceError:
                return  # this graph does not hold at these lengths, and says so
            flat = [x.clone() if isinstance(x, Tensor) else x for x in before]
            result.runs += 1
            try:
                with torch.no_grad():
                    values = emitted.module(*flat, chunk)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong is a fault
                yield f"chunk {chunk}, call {number}: {error!r}"
                return
            got = tree_leaves(packed_outputs(traced, values))
            fault = difference(got, wanted, rtol)
            if fault is not None:
                yield f"chunk {chunk}, call {number}: {fault}"
                return
            if any(
                isinstance(x, Tensor) and not same(x, y) for x, y in zip(flat, before, strict=True)
            ):
                yield f"chunk {chunk}, call {number}: an input was written to"
                return


def chunk_sizes(units: int) -> list[int]:
    """1, all, all but one, and sizes that leave a part at the end."""
    return sorted(
        {c for c in (1, 2, 3, units // 2, 2 * units // 3, units - 1, units) if 0 < c <= units}
    )


def same(x: Tensor, y: Tensor) -> bool:
    """Bit for bit, not-a-numbers too."""
    return bool(torch.equal(x, y) or torch.equal(x.isnan() | (x == y), torch.ones_like(x).bool()))


def difference(got: Sequence[Any], wanted: Sequence[Any], rtol: float) -> str | None:  # noqa: C901
    """How two lists of outputs differ in words, or None."""
    if len(got) != len(wanted):
        return f"{len(got)} outputs, not {len(wanted)}"
    for x, y in zip(got, wanted, strict=True):
        if not isinstance(y, Tensor):
            if x != y:
                return f"{x!r}, not {y!r}"
        elif (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"{list(x.shape)} {x.dtype}, not {list(y.shape)} {y.dtype}"
        elif not y.is_floating_point():
            if not torch.equal(x, y):
                return "integers differ"
        elif y.numel() and not same(x, y):
            finite = y.isfinite()
            if not torch.equal(x.isfinite(), finite):
                return "not finite elsewhere"
            error = float((x - y)[finite].abs().max() / max(1.0, float(y[finite].abs().max())))
            if error > rtol:
                return f"off by {error:.1e}"
    return None


class Calls(nn.Module):
    """A function as a module: ``function(self, *args)``."""

    def __init__(self, function: Any, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


class Block(nn.Module):
    """Attention and a perceptron, as third-party code writes them."""

    def __init__(self, channels: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.q, self.k, self.v = (nn.Linear(channels, channels) for _ in range(3))
        self.out = nn.Linear(channels, channels)
        self.up, self.down = nn.Linear(channels, 4 * channels), nn.Linear(4 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = self.norm(x)
        q, k, v = (
            part(y).view(b, n, self.heads, c // self.heads).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        y = (q @ k.transpose(-1, -2) / 3).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Stack(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def pairs(x: Tensor) -> Tensor:
    """Something large in the middle: (b, n, c) -> (b, n, n, c) -> (b, n, c)."""
    return (x.exp()[:, :, None] * x.tanh()[:, None]).sum(2) / 99


class Mixed(nn.Module):
    """A few layers drawn from all sorts over a stream (b, n, c), with one to three outputs."""

    def __init__(self, seed: int, channels: int) -> None:
        super().__init__()
        draw = random.Random(seed)
        c = self.channels = channels
        self.heads = draw.choice([h for h in (1, 2, 3, 4) if c % h == 0])
        self.plan = [draw.choice(LAYERS) for _ in range(draw.randint(2, 4))]
        self.outputs = draw.randint(1, 3)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "a": nn.Linear(c, c),
                    "b": nn.Linear(c, c),
                    "d": nn.Linear(c, c, bias=False),
                    "up": nn.Linear(c, 3 * c),
                    "down": nn.Linear(3 * c, c),
                    "norm": nn.LayerNorm(c),
                    "conv": nn.Conv1d(c, c, 3, padding=1),
                    "batch": nn.BatchNorm1d(c),
                    "group": nn.GroupNorm(self.heads, c),
                }
            )
            for _ in self.plan
        )
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        kept = []
        for name, layer in zip(self.plan, self.layers, strict=True):
            y = getattr(self, name)(layer, x)
            kept.append(y)
            x = x + y
        return x if self.outputs == 1 else (x, *kept[1 - self.outputs :])

    def split_heads(self, t: Tensor) -> Tensor:
        b, n, c = t.shape
        return t.view(b, n, self.heads, c // self.heads).transpose(1, 2)

    def join_heads(self, t: Tensor) -> Tensor:
        b, h, n, e = t.shape
        return t.transpose(1, 2).reshape(b, n, h * e)

    def attention(self, m: Any, x: Tensor) -> Tensor:
        q, k, v = (self.split_heads(m[name](x)) for name in "abd")
        return self.join_heads((q @ k.transpose(-1, -2) * 0.3).softmax(-1) @ v)

    def fused_qkv(self, m: Any, x: Tensor) -> Tensor:
        q, k, v = map(self.split_heads, m["up"](m["norm"](x)).chunk(3, -1))
        a = torch.einsum("bhid,bhjd->bhij", q, k)
        a = (a - a.amax(-1, keepdim=True)).exp()
        return self.join_heads(torch.einsum("bhij,bhjd->bhid", a / a.sum(-1, keepdim=True), v))

    def causal(self, m: Any, x: Tensor) -> Tensor:
        n = x.shape[1]
        q, k, v = self.split_heads(m["a"](x)), self.split_heads(m["b"](x)), self.split_heads(x)
        mask = torch.ones(n, n, dtype=torch.bool).tril()
        a = (q @ k.transpose(-1, -2)).masked_fill(~mask, float("-inf"))
        return m["d"](self.join_heads(a.softmax(-1) @ v))

    def fused_attention(self, m: Any, x: Tensor) -> Tensor:
        q, k, v = self.split_heads(m["a"](x)), self.split_heads(x), self.split_heads(m["b"](x))
        causal = self.outputs == 2
        return self.join_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))

    def perceptron(self, m: Any, x: Tensor) -> Tensor:
        return m["down"](F.gelu(m["up"](m["norm"](x))))

    def convolution(self, m: Any, x: Tensor) -> Tensor:
        return m["conv"](x.transpose(1, 2)).transpose(1, 2).tanh()

    def gate(self, m: Any, x: Tensor) -> Tensor:
        return m["a"](x).sigmoid() * m["b"](x)

    def triangle(self, m: Any, x: Tensor) -> Tensor:
        z = x[:, :, None] * m["a"](x)[:, None]
        return (torch.einsum("bikc,bjkc->bijc", z, z) * 0.01).mean(2).tanh()

    def outer(self, m: Any, x: Tensor) -> Tensor:
        o = torch.einsum("bic,bjd->bijcd", x[..., :2], x[..., :2]).flatten(-2)
        return m["a"](x) * o.mean((2, 3))[..., None].tanh()

    def pool(self, m: Any, x: Tensor) -> Tensor:
        return m["a"](x * (x.amax(1, keepdim=True) + x.mean(1, keepdim=True))).tanh()

    def concatenate(self, m: Any, x: Tensor) -> Tensor:
        return m["down"](torch.cat([x, m["a"](x), x.exp().clamp(max=3)], -1))

    def gather(self, m: Any, x: Tensor) -> Tensor:
        return x.gather(1, m["a"](x).argsort(1)) * 0.5

    def scan(self, m: Any, x: Tensor) -> Tensor:
        return (x.softmax(1) * m["a"](x)).cumsum(1).tanh()

    def gated_unit(self, m: Any, x: Tensor) -> Tensor:
        return F.glu(torch.cat([m["a"](x), m["b"](x)], -1), -1)

    def standardise(self, m: Any, x: Tensor) -> Tensor:
        return (x - x.mean((0, 1), keepdim=True)) / (x.var((0, 1), keepdim=True) + 1).sqrt()

    def batch_norm(self, m: Any, x: Tensor) -> Tensor:
        return m["batch"](x.transpose(1, 2)).transpose(1, 2)

    def group_norm(self, m: Any, x: Tensor) -> Tensor:
        return m["group"](x.transpose(1, 2)).transpose(1, 2)

    def rotary(self, m: Any, x: Tensor) -> Tensor:
        n, c = x.shape[1:]
        angle = torch.arange(n, dtype=WIDE)[:, None] * torch.arange(1, c + 1, dtype=WIDE) / c
        turned = torch.cat([-x[..., 1:], x[..., :1]], -1)
        return m["a"](x) * angle.cos() + turned * angle.sin()

    def rolled(self, m: Any, x: Tensor) -> Tensor:
        return x.roll(1, 1) * m["a"](x).tanh()

    def parts(self, m: Any, x: Tensor) -> Tensor:
        first, rest = x.split([1, x.shape[1] - 1], 1)
        return torch.cat([rest.exp().clamp(max=2), first.tanh()], 1)

    def pair_update(self, m: Any, x: Tensor) -> Tensor:
        z = m["b"](m["a"](x[:, :, None] + x[:, None]).relu())
        return z.softmax(2).sum(2) * x + z.sum(1) * 0.01

    def pooled(self, m: Any, x: Tensor) -> Tensor:
        return F.avg_pool1d(x.transpose(1, 2), 2, 1, 1)[..., :-1].transpose(1, 2).tanh()

    def products(self, m: Any, x: Tensor) -> Tensor:
        return torch.einsum("bic,bjc,bjd->bid", x, m["a"](x).tanh(), x) * 0.01

    def deviation(self, m: Any, x: Tensor) -> Tensor:
        y = m["a"](F.dropout(x, 0.3, training=False))
        return y / y.std(1, keepdim=True).add(1)


LAYERS = [
    name
    for name, value in vars(Mixed).items()
    if not name.startswith("_") and name not in ("forward", "split_heads", "join_heads")
]


def mixed(seed: int) -> tuple[Mixed, tuple[Tensor], tuple[Tensor]]:
    """A model, arguments for it, and arguments of other lengths; no two dims alike."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    b, n, c = draw.choice([2, 3, 5]), draw.choice([7, 8, 11, 13]), draw.choice([4, 6, 9, 12])
    model = Mixed(seed, c)
    return model, (torch.randn(b, n, c, dtype=WIDE),), (torch.randn(b + 2, n + 6, c, dtype=WIDE),)


def planned(model: nn.Module, example: Any, share: float = 0.5) -> Any:
    """A plan of loops, its budget this share of the way from the floor to the peak or less.

    A floor of a fifth of the peak is tried first; a refusal tells the true one.
    """
    import hairpin as hp

    peak = hp.estimate(model, example)
    floor = peak // 5
    for more in (0.0, 0.0, 0.1, 0.2, 0.3):
        budget = int(floor + min(share + more, 0.95) * (peak - floor))
        try:
            return hp.plan(model, example, memory=budget)
        except hp.MemoryBudgetError as refused:
            floor = refused.floor_bytes
    raise AssertionError(f"no plan between {floor} and {peak} bytes")


def looped(model: nn.Module, plan: Any, *args: Any, **kwargs: Any) -> Any:
    """The result of one call under a plan, without gradients; the plan comes off again."""
    import hairpin as hp

    hp.parallelize(model, plan)
    try:
        with torch.no_grad():
            return model(*args, **kwargs)
    finally:
        hp.detach(model)
