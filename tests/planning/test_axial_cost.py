"""What a rehearsal reads off is what a rank does; the choice follows from it."""

import weakref
from dataclasses import replace

import pytest
import torch

import hairpin as hp
from hairpin.comm.rehearsal import RehearsalMesh, Sent, Work
from hairpin.comm.topology import Tier, Topology
from hairpin.comm.transport import Link
from hairpin.errors import MemoryBudgetError, MeshError, PlanError
from hairpin.models.alphafold import presets
from hairpin.models.alphafold.evoformer import EvoformerStack
from hairpin.planning.axial.attach import AxialSplit, attach_axial
from hairpin.planning.axial.choose import Lengths, Manner, rehearse_block
from hairpin.planning.axial.cost import Rehearsed, Speeds, most_hidden_s, predict, rehearse
from hairpin.run.launch import launch
from hairpin.run.profile import peak_cpu_bytes
from marks import slow
from planning.test_axial import WAYS, words_of

S, R = 9, 42
# Kept while rows in pieces are recomputed with the same draws; no operation makes it.
_RANDOM_STATE_BYTES = torch.get_rng_state().nbytes


def stack(blocks=1, *, device="cpu", multimer=False):
    with torch.device(device):
        return EvoformerStack(presets.tiny(multimer=multimer).evoformer, blocks).eval()


def arguments(device="cpu"):
    shapes = (S, R, 16), (R, R, 16), (S, R), (R, R)
    return [torch.ones(shape, device=device) for shape in shapes]


def rehearsed(rank, degrees, words, *, backward):
    mesh = RehearsalMesh(rank, **degrees)
    model = stack(device="meta")
    plan = hp.plan_axial(mesh, **words)
    attach_axial(model, AxialSplit(plan, mesh))
    return rehearse(model, arguments("meta"), mesh, backward=backward)


def check_counts(degrees, backward, ways):
    mesh = hp.init_mesh(**degrees, timeout_s=30)
    for words in ways:
        model = stack().requires_grad_(backward)
        hp.parallelize(model, hp.plan_axial(mesh, **words), mesh)
        args = arguments()

        def step(model=model, args=args):
            m, z = model(*args)
            if backward:
                (m.sum() + z.sum()).backward()

        before = mesh.traffic.snapshot()
        step()
        sent = mesh.traffic.since(before)
        told = rehearsed(mesh.global_rank, degrees, words, backward=backward)
        assert told.sent_bytes == sent.bytes_sent, words
        assert len(told.sent) == sent.collectives, words
        if not backward:
            peak = peak_cpu_bytes(step)
            assert peak - told.peak_bytes in {0, _RANDOM_STATE_BYTES}, (
                words,
                told.peak_bytes,
                peak,
            )


@pytest.mark.parametrize(
    ("world", "backward", "ways"),
    [
        (4, False, WAYS[4::3]),
        (3, True, WAYS[6::4]),
        slow(3, True, WAYS[::2]),
        slow(4, False, WAYS[::2]),
        slow(3, False, WAYS),
    ],
)
@pytest.mark.timeout(600)
def test_a_rehearsal_tells_what_each_rank_sends_and_holds(world, backward, ways):
    words = [words_of(way) for way in ways]
    rehearsed(0, {"sp": world}, words[0], backward=False)  # so that not every rank imports
    launch(check_counts, world, {"sp": world}, backward, words)


@pytest.mark.parametrize(
    ("degrees", "backward"),
    [({"a": 2, "b": 2}, False), slow({"a": 1, "b": 3}, True), slow({"a": 3, "b": 2}, False)],
)
@pytest.mark.timeout(600)
def test_a_rehearsal_of_a_grid_tells_as_much(degrees, backward):
    words = [{"axis": ("a", "b"), "passing": passing} for passing in ("gather", "ring")]
    launch(check_counts, degrees["a"] * degrees["b"], degrees, backward, words)


def test_the_traffic_of_a_rehearsal_is_what_the_played_rank_would_send():
    mesh = RehearsalMesh(1, sp=3)
    x = torch.empty(2, 9, device="meta")
    hp.switch(x, hp.Layout("t/sp s", t=6, s=9), hp.Layout("t s/sp", t=6, s=9), mesh)
    sent_bytes = 2 * (2 * 3) * 4  # a third of its part to each of the two others
    assert [exchange.nbytes for exchange in mesh.sent] == [sent_bytes]
    assert (mesh.traffic.bytes_sent, mesh.traffic.collectives) == (sent_bytes, 1)


def test_a_rehearsal_holds_nothing_for_ranks_that_get_nothing():
    x = torch.empty(6, 9)
    storage = weakref.ref(x.untyped_storage())
    nothing = [torch.empty(0)] * 3
    wait = Link(RehearsalMesh(0, sp=3), "sp").exchange([x[:0]] * 3, nothing, what="nothing")
    del x
    assert storage() is None
    wait()


def test_fewer_bytes_than_published():
    """Two turns of z instead of four, and no padding (FastFold pads r to a multiple plus one)."""
    lengths = Lengths(4, sequences=8, residues=24)
    with torch.device("meta"):
        block = stack().blocks[0].to("meta")
    run = rehearse_block(block, Manner(), lengths)
    s, r, c, h, outer = 8, 24, 16, 2, 8
    turns = 2 * s * r * c * 3 / 16 + 2 * r * r * c * 3 / 16
    whole = (3 * h * r * r + s * r * outer + 2 * r * r * c) * 3 / 4
    assert run.sent_bytes == 4 * (turns + whole)


def test_rings_and_channels_hold_a_part():
    lengths = Lengths(4, sequences=16, residues=64)
    block = stack(device="meta").blocks[0]
    alone = rehearse_block(block, Manner(), replace(lengths, degree=1)).peak_bytes
    for product in ("ring", "channels"):
        run = rehearse_block(block, Manner(product, "ring"), lengths)
        assert run.peak_bytes <= 1.08 * alone / 4  # 1.13 with biases and old pairs kept to the end
    run = rehearse_block(block, Manner(), lengths)
    assert run.peak_bytes > 1.15 * alone / 4


# --------------------------------------------------------------------------------- laying out


SPEEDS = Speeds(1.0, float("inf"), Tier(0.0, 1.0), Tier(0.0, 0.5))


def exchange(nbytes, started, awaited, messages=1):
    return Sent("x", nbytes, messages, Work(started), Work(awaited))


def test_a_transfer_behind_enough_work_costs_nothing():
    run = Rehearsed((exchange(3, 1, 5),), 0, Work(10))
    laid_out = predict(run, SPEEDS)
    assert laid_out.time_s == laid_out.compute_s == 10
    assert (laid_out.exposed_s, laid_out.hideable_s) == ((0.0,), (3.0,))


def test_a_transfer_behind_too_little_is_waited_for():
    laid_out = predict(Rehearsed((exchange(3, 1, 2),), 0, Work(10)), SPEEDS)
    assert (laid_out.time_s, laid_out.exposed_s, laid_out.hideable_s) == (12.0, (2.0,), (1.0,))


def test_transfers_take_turns_on_a_link():
    run = Rehearsed((exchange(4, 0, 6), exchange(4, 0, 6)), 0, Work(6))
    assert predict(run, SPEEDS).time_s == 8.0


@pytest.mark.parametrize(
    ("sent", "most"),
    [
        ([exchange(4, 0, 6), exchange(4, 0, 6)], 6.0),  # both behind the same work
        ([exchange(3, 0, 6), exchange(2, 1, 3)], 5.0),  # the second goes first: none is lost
        ([exchange(1, 0, 4), exchange(9, 4, 5)], 2.0),  # a link has nothing to send for a while
        ([exchange(3, 2, 2)], 0.0),
    ],
)
def test_what_work_could_hide_at_most_on_one_link(sent, most):
    assert most_hidden_s(Rehearsed(tuple(sent), 0, Work(6)), SPEEDS) == most


def test_all_to_all_has_its_own_speed():
    assert predict(Rehearsed((exchange(4, 0, 0, messages=3),), 0, Work(1)), SPEEDS).time_s == 9.0


# -------------------------------------------------------------------------------------- choosing


def chosen(link, **words):
    model = stack(device="meta")
    topology = Topology.flat(4, link)
    return hp.plan_axial(
        hp.Mesh(sp=4), model, sequences=16, residues=64, topology=topology, **words
    )


def test_slow_links_choose_the_fewest_bytes():
    plan = chosen(Tier(0.0, 1e3))
    assert plan.product == "channels"
    least = min(c.run.sent_bytes for c in plan.candidates)
    mine = next(c for c in plan.candidates if plan._is(c))
    assert mine.run.sent_bytes == least
    text = plan.explain()
    assert "by channels" in text
    assert "switch 'i/axis j c'" in text


def test_on_a_grid_it_is_chosen_how_biases_pass():
    mesh, model = hp.Mesh(a=2, b=2), stack(device="meta")
    words = {"axis": ("a", "b"), "sequences": 16, "residues": 64}
    fast = hp.plan_axial(mesh, model, **words)
    assert {(c.manner.product, c.manner.passing) for c in fast.candidates} == {
        ("grid", "gather"),
        ("grid", "ring"),
    }
    held = {c.manner.passing: c.run.peak_bytes for c in fast.candidates}
    assert held["ring"] < held["gather"]
    small = hp.plan_axial(mesh, model, **words, memory=held["ring"])
    assert (small.product, small.passing, small.degree) == ("grid", "ring", (2, 2))
    assert "products by grid, biases by ring" in small.explain()
    with pytest.raises(PlanError, match=r"topology is of 3 ranks .* has 4"):
        hp.plan_axial(mesh, model, **words, topology=Topology.flat(3, Tier(0.0, 1.0)))


def test_memory_leaves_out_what_holds_too_much():
    words = {"product": "channels", "pieces": 1}
    plan = chosen(Tier(0.0, 1e3), **words)
    held = {c.run.peak_bytes for c in plan.candidates}
    tight = chosen(Tier(0.0, 1e3), memory=min(held), **words)
    assert next(c for c in tight.candidates if c.fits).run.peak_bytes == min(held)
    with pytest.raises(MemoryBudgetError, match="no way of splitting holds one block in 10"):
        chosen(Tier(0.0, 1e3), passing="gather", memory=10, **words)


def test_chunks_are_tried_where_nothing_fits_at_once():
    words = {"product": "ring", "passing": "gather", "pieces": 1, "backward": True}
    at_once = chosen(Tier(0.0, 1e9), **words)
    least = min(c.run.peak_bytes for c in at_once.candidates)
    plan = chosen(Tier(0.0, 1e9), memory=least // 2, **words)
    mine = next(c for c in plan.candidates if plan._is(c))
    assert plan.chunks > 1
    assert mine.run.peak_bytes <= least // 2
    assert mine.run.done.flops > at_once.candidates[0].run.done.flops  # computed again


def test_one_rank_is_planned_too():
    model = stack(device="meta")
    plan = hp.plan_axial(hp.Mesh(sp=1), model, sequences=S, residues=R)
    assert all(candidate.run.sent_bytes == 0 for candidate in plan.candidates)
    changed = replace(plan, chunks=3).explain()  # a way that was not rehearsed
    assert "in 1 pieces and 3 chunks" in changed
    assert "exchanges" not in changed


def test_what_cannot_be_planned_is_refused():
    model = stack(device="meta")
    with pytest.raises(PlanError, match=r"give sequences=\.\.\. and residues"):
        hp.plan_axial(hp.Mesh(sp=2), model)
    with pytest.raises(PlanError, match="give the model"):
        hp.plan_axial(hp.Mesh(sp=2), memory="1GiB")
    topology = Topology.flat(3, Tier(0.0, 1e9))
    with pytest.raises(PlanError, match=r"topology is of 3 ranks and axis 'sp' has 2"):
        hp.plan_axial(hp.Mesh(sp=2), model, sequences=2, residues=3, topology=topology)
    with pytest.raises(PlanError, match="Linear has no stack"):
        hp.plan_axial(hp.Mesh(sp=2), torch.nn.Linear(1, 1), sequences=2, residues=3)
    with pytest.raises(PlanError, match="sequences=2, residues=-1; there is at least one"):
        hp.plan_axial(hp.Mesh(sp=2), model, sequences=2, residues=-1)
    with pytest.raises(MeshError, match="has no rank 4; play one of 0 to 3"):
        RehearsalMesh(4, sp=4)
    assert replace(hp.plan_axial(hp.Mesh(sp=2)), degree=3).degree == 3
