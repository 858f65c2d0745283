"""Linear attention over ranks against the recurrence in one process: values and all gradients."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from comm.cases import line, near, uniform
from exchange.recurrence import KINDS, attend, inputs
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.comm.transport import Link
from hairpin.errors import LayoutError
from hairpin.exchange.affine import SCHEDULES, bytes_sent
from hairpin.exchange.linear import linear_attention
from hairpin.kernels.linear_attention import Segment
from hairpin.layout import shard_sizes
from hairpin.run.launch import launch
from marks import slow

WORLDS = (1, 2, 3, slow(4), 5, slow(8))
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6, torch.bfloat16: 2e-2}


def part(x, mesh, sizes=None):
    """This rank's part along the sequence, a leaf; a decay per head is the same on every rank."""
    if x is None or x.dim() == 1:
        return x if x is None else x.detach().clone().requires_grad_()
    sizes = sizes or shard_sizes(x.shape[2], mesh.world)
    return x.detach().split(sizes, 2)[mesh.global_rank].clone().requires_grad_()


def compare(mesh, whole, wanted, gradients, cotangent, *, case, sizes=None, run=None, **how):
    """Value and gradients of this rank's part. ``wanted`` and ``gradients`` are of the whole."""
    dtype = whole[0].dtype
    mine = [part(x, mesh, sizes) for x in whole]
    call = partial(linear_attention, mesh=mesh, axis="sp", **how)
    out = call(*mine) if run is None else run(call, *mine)
    tolerance = TOLERANCES[dtype]
    assert out.dtype == dtype, case
    scale = float(wanted.abs().max()) if wanted.numel() else 0
    assert off(out, part(wanted, mesh, sizes)) <= tolerance * scale, f"value: {case}"
    out.backward(part(cotangent, mesh, sizes).to(dtype))
    for name, x, b in zip("qkvg", mine, gradients, strict=False):
        got, own = x.grad, part(b, mesh, sizes)
        if x.dim() == 1:  # a parameter: its gradients add up over ranks
            got, own = hp.all_reduce(got, mesh, axis="sp", grad="partial"), b
        scale = float(b.abs().max()) if b.numel() else 0
        error = off(got, own)
        assert error <= tolerance * scale, f"gradient of {name} off by {error}: {case}"


def off(got, wanted) -> float:
    assert got.shape == wanted.shape
    return float((got.double() - wanted).detach().abs().max()) if got.numel() else 0.0


def truth(whole, cotangent, **how):
    precise = [None if x is None else x.detach().double().requires_grad_() for x in whole]
    wanted = attend(*precise, **how)
    learning = [x for x in precise if x is not None]
    return wanted.detach(), torch.autograd.grad(wanted, learning, cotangent)


def every_case(lengths, *, kinds=KINDS, dtype=torch.float64, strength=2.0) -> None:
    mesh = line()
    for s in lengths:
        for kind in kinds:
            whole = inputs((2, 2, s, 3, 4), kind, dtype=dtype, strength=strength)
            cotangent = uniform(2, 2, s, 4, seed=s)
            for causal in (True, False):
                wanted, gradients = truth(whole, cotangent, causal=causal)
                for schedule in SCHEDULES:
                    case = f"{s} positions, decay {kind}, causal={causal}, {schedule}"
                    how = {"causal": causal, "schedule": schedule, "length": s}
                    compare(mesh, whole, wanted, gradients, cotangent, case=case, **how)


@pytest.mark.parametrize("world", WORLDS)
def test_values_and_gradients_are_those_of_one_process(world):
    """Lengths that leave ranks empty, that do not divide, and in which some have one more."""
    lengths = [max(world - 1, 1), world + 1 if world > 3 else 3 * world + 2]
    if world <= 4:
        launch(every_case, world, lengths, timeout_s=100)
        return
    launch(every_case, world, lengths[:1], kinds=("none", "channel"), timeout_s=100)
    launch(every_case, world, lengths[1:], kinds=("head", "position"), timeout_s=100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_parts_of_several_chunks(dtype):
    launch(every_case, 2, [141], kinds=("head", "channel"), dtype=dtype, timeout_s=100)


def test_float32_and_bfloat16():
    launch(every_case, 3, [8], dtype=torch.float32, timeout_s=100)
    launch(every_case, 2, [8], dtype=torch.bfloat16, kinds=("none", "position"), timeout_s=100)


def test_decays_so_strong_that_their_exponentials_vanish():
    """Cumulative decays of thousands: an exponential of a difference would be infinite."""
    launch(every_case, 3, [8], strength=400.0, kinds=("position", "channel"), timeout_s=100)


# ------------------------------------------------------------------------------ odd splits


def uneven() -> None:
    """Parts as they come, one of them empty, without a word of the length."""
    mesh = line()
    sizes = {2: [0, 9], 3: [7, 0, 2], 4: [1, 5, 0, 3]}[mesh.world]
    for kind in KINDS:
        whole = inputs((1, 2, 9, 3, 4), kind)
        cotangent = uniform(1, 2, 9, 4)
        for causal in (True, False):
            found = truth(whole, cotangent, causal=causal)
            compare(mesh, whole, *found, cotangent, case=kind, sizes=sizes, causal=causal)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_any_split_will_do(world):
    launch(uneven, world, timeout_s=60)


def with_documents() -> None:
    """Documents that begin on a rank's first position, within it, and span ranks; empty ones."""
    mesh = line()
    for documents in ([2, 6, 1, 0, 4], [3, 3, 3, 4], [0, 12, 1, 0]):
        for kind in KINDS[:: 3 if mesh.world > 3 else 1]:
            whole = inputs((1, 2, 13, 3, 4), kind)
            cotangent = uniform(1, 2, 13, 4)
            for causal in (True, False):
                how = {"causal": causal, "documents": documents}
                found = truth(whole, cotangent, **how)
                for schedule in SCHEDULES if kind == "channel" else SCHEDULES[:1]:
                    case = f"{documents} {kind} causal={causal} {schedule}"
                    compare(mesh, whole, *found, cotangent, case=case, schedule=schedule, **how)


@pytest.mark.parametrize("world", [1, 3, 5])
def test_no_state_crosses_from_document_to_document(world):
    launch(with_documents, world, timeout_s=100)


def on_an_inner_axis() -> None:
    """Two sequences on two lines of ranks."""
    mesh = init_mesh(dp=2, sp=2, timeout_s=20)
    whole = inputs((1, 2, 7, 3, 4), "position", seed=mesh.rank("dp"))
    q, k, v, g = (x.detach().split([4, 3], 2)[mesh.rank("sp")] for x in whole)
    wanted = attend(*whole).detach().split([4, 3], 2)[mesh.rank("sp")]
    for schedule in SCHEDULES:
        assert near(linear_attention(q, k, v, g, mesh=mesh, axis="sp", schedule=schedule), wanted)


def test_each_line_of_ranks_has_its_own_sequence():
    launch(on_an_inner_axis, 4, timeout_s=60)


# --------------------------------------------------------------------------- ways of running


def checkpointed() -> None:
    mesh = line()
    for schedule in SCHEDULES:
        for causal in (True, False):
            whole = inputs((1, 2, 10, 3, 4), "position")
            cotangent = uniform(1, 2, 10, 4)
            found = truth(whole, cotangent, causal=causal)
            for reentrant in (True, False):
                run = partial(checkpoint, use_reentrant=reentrant)
                case = f"{schedule} causal={causal} reentrant={reentrant}"
                how = {"causal": causal, "schedule": schedule, "run": run}
                compare(mesh, whole, *found, cotangent, case=case, **how)


@pytest.mark.parametrize("world", [2, 3])
def test_both_modes_of_checkpointing(world):
    launch(checkpointed, world, timeout_s=60)


def twice() -> None:
    """Two backwards through one graph, and two layers one after the other."""
    mesh = line()
    for schedule in SCHEDULES:
        whole = inputs((1, 2, 7, 4, 4), "position")
        q, k, v, g = (part(x, mesh) for x in whole)
        how = {"mesh": mesh, "axis": "sp", "schedule": schedule}
        out = linear_attention(linear_attention(q, k, v, g, **how), k, v, g, **how)
        wanted = attend(attend(*whole), *whole[1:])
        gradients = torch.autograd.grad((wanted**2).sum(), whole)
        loss = (out**2).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        for x, gradient in zip((q, k, v, g), gradients, strict=True):
            assert near(x.grad, 2 * part(gradient, mesh)), schedule


def test_layers_on_layers_and_two_backwards():
    launch(twice, 3, timeout_s=60)


def without_gradients() -> None:
    mesh = line()
    whole = inputs((1, 2, 10, 3, 4), "head")
    mine = [part(x, mesh) for x in whole]
    wanted = part(attend(*whole).detach(), mesh)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = linear_attention(*mine, mesh=mesh, axis="sp")
        assert near(out, wanted)
        assert not out.requires_grad


def test_inference():
    launch(without_gradients, 3, timeout_s=60)


# ------------------------------------------------------------------------------- what is sent


def traffic() -> list[tuple]:
    mesh, found = line(), []
    for schedule in SCHEDULES:
        for kind in KINDS:
            for s in (11, 1000):
                mine = [part(x, mesh) for x in inputs((1, 2, s, 3, 4), kind, dtype=torch.float32)]
                before = mesh.traffic.snapshot()
                out = linear_attention(*mine, mesh=mesh, axis="sp", schedule=schedule)
                forward = mesh.traffic.since(before)
                before = mesh.traffic.snapshot()
                out.sum().backward()
                backward = mesh.traffic.since(before)
                found.append((schedule, kind, forward.bytes_sent, backward.bytes_sent))
    return found


@pytest.mark.parametrize("world", [2, 5])
def test_bytes_are_those_of_the_states_at_any_length(world):
    """``H d e`` numbers of 4 bytes; with a decay also its own where the schedule sends it."""
    state = 2 * 3 * 4 * 4
    decays = {"none": 0, "head": 2 * 4, "position": 2 * 4, "channel": 2 * 3 * 4}
    for rank, found in enumerate(launch(traffic, world, timeout_s=60)):
        behind = world - 1 - rank
        for schedule, kind, forward, backward in found:
            sizes = state, decays[kind]
            assert forward == bytes_sent(schedule, world, rank, *sizes)
            assert backward == bytes_sent(schedule, world, behind, *sizes)
            if schedule == "chain":
                assert forward == (state if behind else 0)
            if schedule == "all_gather":
                assert forward + backward == (world - 1) * sum(sizes)


def sum_of_states() -> int:
    mesh = line()
    mine = [part(x, mesh) for x in inputs((1, 2, 12, 3, 4), "none")]
    linear_attention(*mine, mesh=mesh, axis="sp", causal=False)
    return mesh.traffic.bytes_sent


def test_both_ways_without_decay_is_one_sum():
    state = 2 * 3 * 4 * 8
    assert launch(sum_of_states, 4, timeout_s=60) == [2 * state * 3 // 4] * 4


# ------------------------------------------------------------------------- what hides the wait


class Passed(torch.autograd.Function):
    """The identity, which notes when its gradient comes by."""

    @staticmethod
    def forward(ctx, x, note):
        ctx.note = note
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.note("within, backward")
        return grad, None


def order_of_events(schedule) -> tuple[list[str], list[str]]:
    mesh, events = line(), []
    real_exchange, real_attend = Link.exchange, Segment.attend

    def exchange(self, sends, receives, **words):
        wait = real_exchange(self, sends, receives, **words)
        kind = "receive" if any(x.numel() for x in receives) else "send"
        events.append(f"start {kind}")

        def noted():
            wait()
            events.append(f"await {kind}")

        return noted

    def attend_noted(self, q):
        events.append("within")
        return real_attend(self, Passed.apply(q, events.append))

    Link.exchange, Segment.attend = exchange, attend_noted
    out = linear_attention(
        *(part(x, mesh) for x in inputs((1, 2, 9, 3, 4), "position")),
        mesh=mesh, axis="sp", schedule=schedule,
    )  # fmt: skip
    forward, events[:] = list(events), []
    out.sum().backward()
    return forward, events


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_state_travels_during_the_work_within(schedule):
    """A receive is posted before the work of a part and awaited after it, in both passes."""
    by_rank = launch(order_of_events, 3, schedule, timeout_s=60)
    forward, backward = by_rank[1]
    for events, within in ((forward, "within"), (backward, "within, backward")):
        at = events.index(within)
        assert events.index("start receive") < at < events.index("await receive")
    if schedule == "chain":
        sent = ["start receive", "within", "await receive", "start send", "await send"]
        assert forward == sent
        assert by_rank[0][0] == ["start send", "within", "await send"]
        assert by_rank[2][1] == ["start send", "within, backward", "await send"]


# ------------------------------------------------------------------------------------ refusals


ONE, FOUR = Mesh(sp=1), Mesh(sp=4)
X = torch.zeros(1, 2, 5, 3)


@pytest.mark.parametrize(
    ("arguments", "how", "words"),
    [
        ((X, X[..., :2], X), {}, r"q \[b, h, s, d\], .* are \(1, 2, 5, 3\), \(1, 2, 5, 2\)"),
        ((X, X, X[:, :, :4]), {}, "linear attention takes q"),
        ((X[0], X[0], X[0]), {}, "linear attention takes q"),
        ((X.long(), X, X), {}, r"q is torch\.int64; it has to be floating point"),
        ((X, X, X, X[..., 0].bool()), {}, r"log_decay is torch\.bool; it has to be floating"),
        ((X, X, X, torch.zeros(3)), {}, r"log_decay has shape \(3,\); give \[h\] = \(2,\)"),
        ((X, X, X, X[:, :, :, :2]), {}, r"log_decay has shape \(1, 2, 5, 2\)"),
        ((X, X, X), {"schedule": "ring"}, "schedule='ring': write one of 'chain', 'all_gather'"),
        ((X, X, X), {"documents": [3, 1]}, "has 5 positions; of a sequence of 4 its share is 4"),
        ((X, X, X), {"documents": [7, -2]}, r"documents=\[7, -2\]: a length is a whole number"),
        ((X, X, X), {"documents": [5], "length": 6}, "do not fill a sequence of length=6"),
        ((X, X, X), {"length": 6}, "rank 0 of 1 on axis 'sp' has 5 positions"),
        ((X, X, X), {"length": 5, "mesh": FOUR}, "rank 0 of 4 on axis 'sp' has 5 .* share is 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(arguments, how, words):
    with pytest.raises(LayoutError, match=words):
        linear_attention(*arguments, **{"mesh": ONE, "axis": "sp", **how})
