"""The verbs move every bit to where one process would find it, and refuse what they cannot."""

import copy

import pytest
import torch

import hairpin as hp
from comm.cases import (
    PLAIN_DTYPES,
    RARE_DTYPES,
    WORLDS,
    arbitrary,
    line,
    near,
    part_of,
    places,
    same_bits,
    uniform,
)
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.errors import LayoutError, MeshError
from hairpin.layout import Layout
from hairpin.run.launch import launch

# Pairs of layouts one switch apart; the sizes b, t, s, c come with each case.
PATTERNS = [
    ("t/sp s", "t s/sp"),
    ("b t/sp s c", "b t s/sp c"),
    ("b t s/sp c", "b/sp t s c"),
    ("(b t/sp) s c", "(b t) s/sp c"),
    ("(b s/sp) t c", "(b s) t/sp c"),
    ("(b s) (t/sp c)", "(b s/sp) (t c)"),
    ("(b t/sp s) c", "(b t s/sp) c"),
    ("1 t/sp 1 s", "1 t 1 s/sp"),
]


def lengths(world: int) -> list[tuple[int, int]]:
    """Pairs of lengths: 0, 1, fewer than ranks, as many, one more, primes."""
    fewer = max(world - 1, 1)
    pairs = [(0, 5), (1, 7), (fewer, world + 1), (17, 13), (world, 2 * world), (0, 0)]
    return pairs if world <= 4 else pairs[:4]


def check_data_movement(mesh, src, dst, whole, *, case):
    """Scatter, switch there and back, gather: every step against the reference, bit by bit."""
    at = places(mesh)
    before, after = part_of(whole, src, at), part_of(whole, dst, at)
    held = hp.scatter(whole, src, mesh)
    assert same_bits(held, before), f"scatter {case}"
    turned = hp.switch(held, src, dst, mesh)
    assert same_bits(turned, after), f"switch {case}"
    assert mesh.world == 1 or turned.is_contiguous(), f"switch {case} gives a contiguous tensor"
    assert same_bits(hp.switch(turned, dst, src, mesh), before), f"switch back {case}"
    for grad in ("replicated", "partial"):
        assert same_bits(hp.gather(turned, dst, mesh, grad=grad), whole), f"gather {case}"
    pending = hp.switch(held, src, dst, mesh, wait=False)
    assert same_bits(pending.wait(), after), f"switch started early {case}"
    pending = hp.gather(held, src, mesh, grad="partial", wait=False)
    assert same_bits(pending.wait(), whole), f"gather started early {case}"


def all_patterns_and_lengths() -> None:
    mesh = line()
    for seed, (t, s) in enumerate(lengths(mesh.world)):
        for patterns in PATTERNS if mesh.world <= 4 else PATTERNS[2:4]:
            sizes = {"b": 2, "t": t, "s": s, "c": 3}
            src, dst = (Layout.of(pattern, sizes) for pattern in patterns)
            whole = arbitrary(src.global_shape, torch.float32, seed=seed)
            check_data_movement(mesh, src, dst, whole, case=f"{src} -> {dst}")


@pytest.mark.parametrize("world", WORLDS)
def test_every_bit_arrives(world):
    launch(all_patterns_and_lengths, world, timeout_s=60)


def all_dtypes() -> None:
    mesh = line()
    src, dst = Layout("t/sp s c", t=7, s=5, c=2), Layout("t s/sp c", t=7, s=5, c=2)
    for dtype in PLAIN_DTYPES + RARE_DTYPES:
        check_data_movement(mesh, src, dst, arbitrary((7, 5, 2), dtype), case=str(dtype))


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_dtype_is_carried_unchanged(world):
    launch(all_dtypes, world, timeout_s=60)


def odd_inputs() -> None:
    mesh = line()
    at = places(mesh)
    src, dst = Layout("t/sp s", t=7, s=6), Layout("t s/sp", t=7, s=6)
    numbers = torch.complex(uniform(7, 6), uniform(7, 6, seed=1))
    inputs = {
        "transposed": arbitrary((6, 7), torch.float32).T,
        "strided": arbitrary((14, 12), torch.float32)[::2, ::2],
        "offset": arbitrary((9, 9), torch.float64)[1:8, 2:8],
        "expanded": arbitrary((7, 1), torch.float32).expand(7, 6),
        "flipped": arbitrary((7, 6), torch.float32).flip(0),
        "conjugate": numbers.conj(),
        "conjugate, transposed": torch.complex(uniform(6, 7), uniform(6, 7, seed=1)).mH,
        "negative bit": numbers.conj().imag,
        "negative bit, contiguous": torch._neg_view(uniform(7, 6)),
        "real view": numbers.real,
        "a parameter": torch.nn.Parameter(uniform(7, 6)),
    }
    for name, whole in inputs.items():
        plain = whole.detach().resolve_conj().resolve_neg().contiguous()
        check_data_movement(mesh, src, dst, whole.detach(), case=name)
        # and where the rank's own part is what is not contiguous
        mine = whole.tensor_split(mesh.world, 0)[at["sp"][0]]
        assert same_bits(hp.switch(mine, src, dst, mesh), part_of(plain, dst, at)), name
        assert same_bits(hp.gather(mine, src, mesh, grad="partial"), plain), name
        want = part_of(sum([plain] * mesh.world), src, at)
        assert near_any(hp.reduce_scatter(whole, src, mesh), want), name
        total = hp.all_reduce(whole, mesh, axis="sp", grad="partial")
        assert near_any(total, plain * mesh.world), name


def near_any(got, want) -> bool:
    return got.dtype == want.dtype and torch.allclose(got, want, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_inputs_may_lie_in_memory_in_any_way(world):
    launch(odd_inputs, world, timeout_s=60)


def channels_last() -> None:
    mesh = line()
    src, dst = Layout("b c/sp h w", b=2, c=5, h=3, w=4), Layout("b c h/sp w", b=2, c=5, h=3, w=4)
    whole = arbitrary((2, 5, 3, 4), torch.float32).contiguous(memory_format=torch.channels_last)
    check_data_movement(mesh, src, dst, whole, case="channels last")
    total = hp.all_reduce(uniform(2, 5, 3, 4), mesh, axis="sp", grad="partial")
    assert near(total, uniform(2, 5, 3, 4) * mesh.world)


def test_channels_last():
    launch(channels_last, 3, timeout_s=60)


# Sums


def sums() -> None:
    mesh = line()
    at, rank = places(mesh), mesh.global_rank
    for t, s in lengths(mesh.world):
        for pattern in ("t/sp s", "(s t/sp) 1"):
            layout = Layout.of(pattern, {"t": t, "s": s})
            terms = [uniform(*layout.global_shape, seed=peer) for peer in range(mesh.world)]
            total = torch.stack(terms).sum(0)
            case = f"{layout} on {mesh}"
            got = hp.reduce_scatter(terms[rank], layout, mesh)
            assert near(got, part_of(total, layout, at)), f"reduce_scatter {case}"
            got = hp.reduce_scatter(terms[rank], layout, mesh, wait=False).wait()
            assert near(got, part_of(total, layout, at)), f"reduce_scatter started early {case}"
            for grad in ("replicated", "partial"):
                got = hp.all_reduce(terms[rank], mesh, axis="sp", grad=grad)
                assert near(got, total), f"all_reduce {case}"
            got = hp.all_reduce(terms[rank], mesh, axis="sp", grad="partial", wait=False).wait()
            assert near(got, total), f"all_reduce started early {case}"
            assert torch.equal(terms[rank], uniform(*layout.global_shape, seed=rank)), "input kept"
    scalar = hp.all_reduce(torch.tensor(rank + 1.0), mesh, axis="sp", grad="partial")
    assert scalar.shape == ()
    assert float(scalar) == mesh.world * (mesh.world + 1) / 2


@pytest.mark.parametrize("world", WORLDS)
def test_sums_are_those_of_one_process(world):
    launch(sums, world, timeout_s=60)


def sums_in_rank_order() -> list[torch.Tensor]:
    mesh = line()
    layout = Layout("n/sp", n=9)
    terms = [arbitrary((9,), torch.int32, seed=peer).float() for peer in range(mesh.world)]
    total = terms[0].clone()
    for term in terms[1:]:
        total += term
    got = hp.reduce_scatter(terms[mesh.global_rank], layout, mesh)
    assert same_bits(got, part_of(total, layout, places(mesh)))
    return hp.all_reduce(terms[mesh.global_rank] / 3, mesh, axis="sp", grad="partial").tolist()


def test_a_sum_does_not_depend_on_timing_or_rank():
    by_rank = launch(sums_in_rank_order, 4, timeout_s=60)
    assert all(got == by_rank[0] for got in by_rank)


NOT_SUMMABLE = (torch.bool, torch.int16, *RARE_DTYPES[:3], *RARE_DTYPES[5:])


def sums_by_dtype() -> None:
    mesh = line()
    layout = Layout("t/sp s", t=5, s=3)
    terms = [torch.arange(15).view(5, 3) + peer for peer in range(mesh.world)]
    total = torch.stack(terms).sum(0)
    for dtype in PLAIN_DTYPES + RARE_DTYPES:
        term = terms[mesh.global_rank].to(dtype)
        verbs = {
            "reduce_scatter": lambda x: hp.reduce_scatter(x, layout, mesh),
            "all_reduce": lambda x: hp.all_reduce(x, mesh, axis="sp", grad="partial"),
        }
        for name, verb in verbs.items():
            if dtype in NOT_SUMMABLE:
                words = rf"{name} of {str(dtype).removeprefix('torch.')}: .* convert the tensor"
                with pytest.raises(LayoutError, match=words):
                    verb(term)
                continue
            want = total.to(dtype)
            if name == "reduce_scatter":
                want = part_of(want, layout, places(mesh))
            assert same_bits(verb(term), want), f"{name} {dtype}"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_dtype_is_added_or_refused_by_name(world):
    launch(sums_by_dtype, world, timeout_s=60)


# Sub-groups


def two_axes(dp: int, sp: int) -> None:
    mesh = init_mesh(dp=dp, sp=sp, timeout_s=20)
    at = places(mesh)
    assert (mesh.rank("dp"), mesh.rank("sp")) == (at["dp"][0], at["sp"][0])
    sizes = {"b": 3, "t": 5, "s": 7, "c": 2}

    def layouts(*patterns):
        return [Layout.of(pattern, sizes) for pattern in patterns]

    for src, dst in (
        layouts("b/dp t/sp s c", "b/dp t s/sp c"),  # over sp only, split on two axes
        layouts("b/dp t/sp s c", "b t/sp s/dp c"),  # over dp only
        layouts("(b/dp t/sp) s c", "(b/dp t) s/sp c"),
        layouts("(b s/sp) t/dp c", "(b/dp s/sp) t c"),
        layouts("b t/sp s c", "b t s/sp c"),  # dp holds everything twice
        layouts("b t/dp s c", "b t s/dp c"),
    ):
        whole = arbitrary(src.global_shape, torch.float64, seed=3)
        before, after = part_of(whole, src, at), part_of(whole, dst, at)
        assert same_bits(hp.switch(before, src, dst, mesh), after), f"{src} -> {dst}"
        assert same_bits(hp.switch(after, dst, src, mesh), before), f"{dst} -> {src}"
        for axis in src.axes:
            gathered = hp.gather(before, src, mesh, axis=axis, grad="partial")
            assert same_bits(gathered, part_of(whole, src.split(None, axis), at))
            assert same_bits(hp.scatter(gathered, src, mesh, axis=axis), before)

    layout = Layout.of("b/dp t/sp", sizes)
    terms = [uniform(3, 5, seed=peer) for peer in range(mesh.world)]
    mine = part_of(terms[mesh.global_rank], layout.split(None, "sp"), at)
    along_sp = [terms[at["dp"][0] * sp + peer] for peer in range(sp)]
    got = hp.reduce_scatter(mine, layout, mesh, axis="sp")
    assert near(got, part_of(torch.stack(along_sp).sum(0), layout, at))
    along_dp = [terms[peer * sp + at["sp"][0]] for peer in range(dp)]
    got = hp.all_reduce(terms[mesh.global_rank], mesh, axis="dp", grad="partial")
    assert near(got, torch.stack(along_dp).sum(0))


@pytest.mark.parametrize(("dp", "sp"), [(2, 2), (1, 2), (2, 1), (2, 3), (3, 2), (2, 4)])
def test_each_axis_moves_alone(dp, sp):
    launch(two_axes, dp * sp, dp, sp, timeout_s=60)


def three_axes() -> None:
    mesh = init_mesh(dp=2, sp=2, cp=2, timeout_s=20)
    at = places(mesh)
    src = Layout("b/dp t/sp s/cp c", b=3, t=3, s=5, c=3)
    whole = arbitrary(src.global_shape, torch.float32)
    for axis in src.axes:
        dst = src.split("c", axis)
        got = hp.switch(part_of(whole, src, at), src, dst, mesh)
        assert same_bits(got, part_of(whole, dst, at)), f"{src} -> {dst}"


def test_three_axes():
    launch(three_axes, 8, timeout_s=60)


def torch_mesh() -> None:
    theirs = torch.distributed.device_mesh.init_device_mesh(
        "cpu", (2, 2), mesh_dim_names=("dp", "sp")
    )
    src, dst = Layout("t/sp s", t=5, s=3), Layout("t s/sp", t=5, s=3)
    whole = uniform(5, 3)
    held = hp.scatter(whole, src, theirs)
    assert torch.equal(
        hp.gather(hp.switch(held, src, dst, theirs), dst, theirs, grad="partial"), whole
    )
    assert near(hp.all_reduce(whole, theirs, axis="dp", grad="partial"), 2 * whole)
    assert float(hp.global_mean(whole.sum(), 15, theirs)) == pytest.approx(float(whole.mean()))


def test_a_mesh_of_torch_will_do():
    launch(torch_mesh_alone, 4, timeout_s=60)


def torch_mesh_alone() -> None:
    torch.distributed.init_process_group("gloo")
    torch_mesh()


# One rank


def test_one_rank_needs_no_process_group():
    mesh = hp.init_mesh(dp=1, sp=1)
    src, dst = Layout("t/sp s", t=5, s=3), Layout("t s/sp", t=5, s=3)
    x = uniform(5, 3)
    for y in (
        hp.scatter(x, src, mesh),
        hp.switch(x, src, dst, mesh),
        hp.switch(x, src, dst, mesh, wait=False).wait(),
        hp.gather(x, src, mesh, grad="partial"),
        hp.gather(x, src, mesh, grad="replicated", wait=False).wait(),
        hp.reduce_scatter(x, src, mesh),
        hp.all_reduce(x, mesh, axis="sp", grad="partial"),
        hp.all_reduce(x, mesh, axis="dp", grad="replicated", wait=False).wait(),
    ):
        assert torch.equal(y, x)
    assert float(hp.global_mean(x.sum(), 15, mesh)) == float(x.sum() / 15)
    assert not torch.distributed.is_initialized()
    assert mesh.traffic.bytes_sent == mesh.traffic.collectives == 0


# What is left alone


def purity() -> None:
    mesh = line()
    src, dst = Layout("t/sp s", t=6, s=4), Layout("t s/sp", t=6, s=4)
    whole = uniform(6, 4)
    kept = whole.clone()
    held = hp.scatter(whole, src, mesh)
    held_kept = held.clone()
    turned = hp.switch(held, src, dst, mesh)
    for y in (
        turned,
        hp.gather(held, src, mesh, grad="partial"),
        hp.reduce_scatter(whole, src, mesh),
        hp.all_reduce(whole, mesh, axis="sp", grad="partial"),
    ):
        y.fill_(-1)  # results are the caller's own
    assert torch.equal(held, held_kept)
    assert torch.equal(whole, kept)
    held.fill_(-1)
    assert torch.equal(whole, kept), "scatter gave a view of its input"


def test_results_share_no_memory_with_inputs():
    launch(purity, 2, timeout_s=60)


def a_shard_is_small() -> int:
    mesh = line()
    return hp.scatter(uniform(64, 8), Layout("t/sp s", t=64, s=8), mesh).untyped_storage().nbytes()


def test_a_shard_does_not_keep_the_whole_alive():
    assert launch(a_shard_is_small, 4, timeout_s=60) == [64 * 8 * 8 // 4] * 4


def written_in_place() -> None:
    mesh = line()
    src, dst = Layout("t/sp s", t=6, s=4), Layout("t s/sp", t=6, s=4)
    for name, verb in {
        "scatter": lambda x: hp.scatter(x, src, mesh),
        "switch": lambda x: hp.switch(hp.scatter(x, src, mesh), src, dst, mesh),
        "gather": lambda x: hp.gather(hp.scatter(x, src, mesh), src, mesh, grad="partial"),
        "reduce_scatter": lambda x: hp.reduce_scatter(x, src, mesh),
        "all_reduce": lambda x: hp.all_reduce(x, mesh, axis="sp", grad="partial"),
    }.items():
        x = uniform(6, 4).requires_grad_()
        y = verb(x)
        y.mul_(2)
        y.sum().backward()
        z = uniform(6, 4).requires_grad_()
        (2 * verb(z)).sum().backward()
        assert torch.equal(x.grad, z.grad), name


def test_results_may_be_written_in_place():
    launch(written_in_place, 2, timeout_s=60)


def in_inference_mode() -> None:
    mesh = line()
    src, dst = Layout("t/sp s", t=5, s=3), Layout("t s/sp", t=5, s=3)
    with torch.inference_mode():
        check_data_movement(mesh, src, dst, uniform(5, 3), case="inference mode")
        y = hp.switch(hp.scatter(uniform(5, 3), src, mesh), src, dst, mesh)
        assert y.is_inference()
        assert near(hp.all_reduce(uniform(3), mesh, axis="sp", grad="replicated"), 2 * uniform(3))
        assert hp.reduce_scatter(uniform(5, 3), src, mesh, wait=False).wait().is_inference()
    with torch.no_grad():
        x = uniform(5, 3).requires_grad_()
        assert not hp.switch(hp.scatter(x, src, mesh), src, dst, mesh).requires_grad


def test_inference_mode_and_no_grad():
    launch(in_inference_mode, 2, timeout_s=60)


# Refusals, which happen before anything is sent


ONE = Mesh(dp=1, sp=1)
FOUR = Mesh(dp=2, sp=4)
FRAMES = Layout("b t/sp s", b=2, t=5, s=3)
PATCHES = Layout("b t s/sp", b=2, t=5, s=3)
BOTH = Layout("b/dp t/sp s", b=2, t=5, s=3)


def x_of(*shape: int) -> torch.Tensor:
    return torch.zeros(shape)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: hp.switch(x_of(2, 3, 5), FRAMES, PATCHES, ONE),
            r"shape \(2, 3, 5\) where .* \(2, 5, 3\) \(rank 0 of 1 on 'dp', rank 0 of 1 on 'sp'\)",
        ),
        (lambda: hp.switch(x_of(2, 5, 3), FRAMES, PATCHES, FOUR), r"local shape \(2, 2, 3\)"),
        (lambda: hp.gather(x_of(3), FRAMES, FOUR, grad="partial"), r"local shape \(2, 2, 3\)"),
        (lambda: hp.scatter(x_of(2, 2, 3), FRAMES, FOUR), r"local shape \(2, 5, 3\)"),
        (lambda: hp.reduce_scatter(x_of(2, 2, 3), FRAMES, FOUR), r"local shape \(2, 5, 3\)"),
        (
            lambda: hp.switch(x_of(2, 5, 3), FRAMES, Layout("b t s/sp", b=2, t=5, s=4), ONE),
            "cannot move from layout .*: a move keeps dims, order and sizes",
        ),
        (
            lambda: hp.switch(x_of(2, 5, 3), FRAMES, Layout("b s/sp t", b=2, t=5, s=3), ONE),
            "a move keeps dims, order and sizes",
        ),
        (
            lambda: hp.switch(x_of(2, 5, 3), FRAMES, Layout("(b t) s/sp", b=2, t=5, s=3), ONE),
            "a move keeps dims, order and sizes",
        ),
        (
            lambda: hp.switch(x_of(1, 2, 3), BOTH, Layout("b t/dp s/sp", b=2, t=5, s=3), FOUR),
            "differ on mesh axes dp, sp; move one axis at a time",
        ),
        (
            lambda: hp.switch(x_of(2, 5, 3), FRAMES, FRAMES.split(None, "sp"), ONE),
            "one side is whole on axis 'sp'; use scatter to split a whole tensor and gather",
        ),
        (
            lambda: hp.switch(x_of(2, 5, 3), FRAMES.split(None, "sp"), FRAMES, ONE),
            "one side is whole on axis 'sp'",
        ),
        (
            lambda: hp.gather(x_of(2, 5, 3), FRAMES.split(None, "sp"), ONE, grad="partial"),
            "gather with layout 'b t s' .*: it is split over no axis; write the split as 's/sp'",
        ),
        (
            lambda: hp.scatter(x_of(2, 5, 3), FRAMES.split(None, "sp"), ONE),
            "scatter with layout 'b t s' .*: it is split over no axis",
        ),
        (
            lambda: hp.gather(x_of(2, 5, 3), BOTH, ONE, grad="partial"),
            "split over dp and sp; say which with axis=",
        ),
        (lambda: hp.reduce_scatter(x_of(2, 5, 3), BOTH, ONE), "say which with axis="),
        (
            lambda: hp.gather(x_of(2, 5, 3), FRAMES, ONE, grad="partial", axis="dp"),
            "nothing in it is split over axis 'dp'",
        ),
        (
            lambda: hp.gather(x_of(2, 5, 3), FRAMES, ONE, grad="sum"),
            "grad='sum': write 'replicated' or 'partial'",
        ),
        (
            lambda: hp.all_reduce(x_of(3), ONE, axis="sp", grad="sum"),
            "grad='sum': write 'replicated' or 'partial'",
        ),
    ],
)
def test_a_wrong_tensor_or_layout_is_refused(call, words):
    with pytest.raises(LayoutError, match=words):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: hp.scatter(x_of(5), Layout("t/tp", t=5), ONE),
        lambda: hp.gather(x_of(5), Layout("t/tp", t=5), ONE, grad="partial"),
        lambda: hp.reduce_scatter(x_of(5), Layout("t/tp", t=5), ONE),
        lambda: hp.all_reduce(x_of(5), ONE, axis="tp", grad="partial"),
        lambda: hp.switch(x_of(5, 3), Layout("t/tp s", t=5, s=3), Layout("t s/tp", t=5, s=3), ONE),
    ],
)
def test_an_axis_that_is_not_on_the_mesh_is_refused(call):
    with pytest.raises(MeshError, match=r"Mesh\(dp=1, sp=1\) has no axis 'tp'; name one of dp, sp"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: hp.scatter(x_of(2, 5, 3), FRAMES, FOUR),
        lambda: hp.gather(x_of(2, 2, 3), FRAMES, FOUR, grad="partial"),
        lambda: hp.switch(x_of(2, 2, 3), FRAMES, PATCHES, FOUR),
        lambda: hp.switch(x_of(2, 2, 3), FRAMES, PATCHES, FOUR, wait=False),
        lambda: hp.reduce_scatter(x_of(2, 5, 3), FRAMES, FOUR),
        lambda: hp.all_reduce(x_of(3), FOUR, axis="sp", grad="partial"),
        lambda: hp.global_mean(x_of().sum(), 1, FOUR),
        lambda: hp.sync_grads(torch.nn.Linear(2, 2), FOUR),
    ],
)
def test_a_description_moves_nothing(call):
    with pytest.raises(MeshError, match=r"Mesh\(dp=2, sp=4\) is only a description; make a live"):
        call()


def a_wrong_shape_names_the_rank() -> str:
    mesh = line()
    before = copy.copy(mesh.traffic)
    with pytest.raises(LayoutError) as caught:
        hp.switch(x_of(2, 9, 3), FRAMES, PATCHES, mesh)
    assert mesh.traffic == before  # nothing was sent
    return str(caught.value)


def test_a_wrong_shape_names_the_rank_and_the_shape_it_should_have():
    messages = launch(a_wrong_shape_names_the_rank, 3, timeout_s=60)
    for rank, (message, t) in enumerate(zip(messages, [2, 2, 1], strict=True)):
        assert f"rank {rank} of 3 on 'sp'" in message
        assert f"local shape (2, {t}, 3)" in message
