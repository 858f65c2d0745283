"""A split model under all that people do to models: checkpoint, compile, copy, undo."""

import copy
import pickle
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from hairpin.models import video_dit
from hairpin.models.video_dit.model import VideoDiT, tiny
from hairpin.run.launch import launch
from marks import slow
from planning.toys import ATTENDS, Along, Video, video_arguments, video_case
from planning.truth import Case, check, loss_of, randomised, require_close, seeded

WORLDS = pytest.mark.parametrize("ranks", [1, slow(2), 3, slow(4)])
MODES = {"reentrant": True, "not reentrant": False}


class Inner(nn.Module):
    """A stage that checkpoints its own inside, dropout and all."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.along = Along(2)
        self.mlp = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))
        self.mode = mode

    def forward(self, x):
        return checkpoint(lambda y: self.mlp(self.along(y)), x, use_reentrant=self.mode)


class Checkpointed(nn.Module):
    """Stages checkpointed one by one, and one that checkpoints its own inside."""

    def __init__(self, mode: bool) -> None:
        super().__init__()
        self.first = Along(2)
        self.inner = Inner(mode)
        self.second = Along(1)
        self.mode = mode

    def forward(self, x):
        x = checkpoint(self.first, x, use_reentrant=self.mode)
        x = checkpoint(self.inner, x, use_reentrant=self.mode)
        return checkpoint(self.second, x, use_reentrant=self.mode)


STAGES = {"first": "b t [s] c", "inner": "b t [s] c", "second": "b [t] s c"}
FRAMES_16_AND_15 = lambda: [video_arguments(2, 15, 6, seed=4)()]  # noqa: E731  # a table's entry

CHECKPOINTED = tuple(
    case
    for name, mode in MODES.items()
    for case in (
        video_case(f"blocks, {name}", (2, 6, 5), mode=mode),
        video_case(f"two shapes, {name}", (2, 6, 5), mode=mode).but(
            "interleaved",
            others=lambda: [video_arguments(1, 4, 9)(), video_arguments(3, 9, 2)()],
            interleaved=True,
        ),
        video_case(f"16 and 15 frames, {name}", (2, 16, 6), mode=mode).but(
            "interleaved", others=FRAMES_16_AND_15, interleaved=True
        ),
        Case(
            f"stages one by one, {name}",
            lambda mode=mode: randomised(Checkpointed(mode), 0.3),
            lambda: ((seeded((2, 16, 6, 4)),), {}),
            STAGES,
            others=lambda: [((seeded((2, 15, 6, 4)),), {})],
            interleaved=True,
        ),
    )
)


# Reentrant in reentrant: torch says that the inner one sees no input that requires a gradient.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("ranks", [slow(1), 2, slow(3), slow(4)])
def test_checkpointing(ranks):
    check(CHECKPOINTED, ranks)


INTERLEAVED = (
    video_case("two shapes without checkpoints").but(
        "interleaved", others=lambda: [video_arguments(1, 4, 9)()], interleaved=True
    ),
)


@pytest.mark.parametrize("ranks", [2, slow(4)])
def test_two_shapes_before_their_backwards(ranks):
    check(INTERLEAVED, ranks)


def _same_storage() -> None:
    """Two forwards on views of one storage, the model's first module a checkpointed stage."""
    mesh = hp.init_mesh(sp=4, timeout_s=30)
    for mode in MODES.values():
        grads = []
        for is_split in (False, True):
            model = randomised(Checkpointed(mode), 0.3)
            buffer = seeded((2, 16, 6, 4)).requires_grad_()
            views = [buffer[:, :16], buffer[:, :15]]
            if is_split:
                plan = hp.plan(model, views[0], mesh, attends=STAGES, more_examples=views[1:])
                hp.parallelize(model, plan, mesh)
            outputs = [model(view) for view in views]
            for output in outputs:
                loss_of(output).backward()
            hp.sync_grads(model, mesh)
            grads.append([p.grad for p in model.parameters()])
        largest = max(float(g.norm()) for g in grads[0])
        for mine, truth in zip(grads[1], grads[0], strict=True):
            require_close(mine, truth, "a gradient", 1e-3 * largest)


def test_two_shapes_in_one_storage():
    launch(_same_storage, 4, timeout_s=60)


def compiled_by_method(backend):
    def after(model):
        for block in model.blocks:
            block.compile(backend=backend)

    return after


def compiled_by_function(backend):
    def after(model):
        for place, block in enumerate(model.blocks):
            model.blocks[place] = torch.compile(block, backend=backend)

    return after


def compiled_stages(backend):
    def after(model):
        for block in model.blocks:
            block.spatial.compile(backend=backend)
            block.temporal.compile(backend=backend)

    return after


def compiled(backend: str, *how) -> tuple[Case, ...]:
    return tuple(
        video_case(f"blocks compiled with {backend}", depth=1).but(
            f"{after(backend).__qualname__}",
            after=after(backend),
            others=lambda: [video_arguments(1, 4, 9)()],
        )
        for after in how
    )


quiet_compiler = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
EAGER = compiled("eager", compiled_by_method, compiled_by_function, compiled_stages)
AOT_EAGER = compiled("aot_eager", compiled_by_method)
INDUCTOR = compiled("inductor", compiled_by_method, compiled_by_function, compiled_stages)


@quiet_compiler
@pytest.mark.parametrize("ranks", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_compiled_blocks(ranks):
    check(EAGER, ranks)


@quiet_compiler
@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_blocks_compiled_with_autograd(ranks):
    check(AOT_EAGER, ranks)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inside the compiler
@quiet_compiler
@pytest.mark.parametrize("ranks", [1, 2])
def test_blocks_compiled_to_machine_code(ranks):
    check(INDUCTOR, ranks)


def test_a_model_that_is_already_compiled_can_be_planned():
    model, plain = Video(depth=1), Video(depth=1)
    for block in model.blocks:
        block.compile(backend="eager")
    x = torch.zeros(2, 6, 5, 2)
    mesh = hp.Mesh(sp=2)
    assert hp.plan(model, x, mesh, attends=ATTENDS) == hp.plan(plain, x, mesh, attends=ATTENDS)


def _live(build, attends, x, mesh):
    model = build()
    return hp.parallelize(model, hp.plan(model, x, mesh, attends=attends), mesh)


def _without_gradients() -> None:
    mesh = hp.init_mesh(sp=3, timeout_s=30)
    x = seeded((2, 7, 5, 2))
    wanted = randomised(Video(), 0.3)(x)
    model = _live(lambda: randomised(Video(), 0.3), ATTENDS, x, mesh)
    for context in (torch.no_grad, torch.inference_mode):
        for _ in range(2):
            with context():
                got = model(x)
            assert not got.requires_grad
            require_close(got, wanted, context.__name__)
    with torch.inference_mode():
        inside = model(x.clone())
    require_close(inside, wanted, "input made in inference mode")
    model.eval()
    require_close(model(x), wanted, "eval")
    model.requires_grad_(False)
    require_close(model(x), wanted, "frozen")


def test_inference_mode_and_no_grad():
    launch(_without_gradients, 3, timeout_s=60)


def _two_models() -> None:
    mesh = hp.init_mesh(sp=2, timeout_s=30)
    x = seeded((2, 7, 5, 2))
    y = seeded((2, 6, 5, 4))
    videos = [randomised(Video(depth), 0.3) for depth in (1, 2)]
    other = randomised(Checkpointed(mode=False), 0.3)
    wanted = [videos[0](x), videos[1](x), videos[0](videos[1](x)), other(y)]
    plans = [hp.plan(model, x, mesh, attends=ATTENDS) for model in videos]
    plans.append(hp.plan(other, y, mesh, attends=STAGES))
    for model, plan in zip([*videos, other], plans, strict=True):
        hp.parallelize(model, plan, mesh)
    got = [videos[0](x), videos[1](x), videos[0](videos[1](x)), other(y)]
    for mine, truth in zip(got, wanted, strict=True):
        require_close(mine, truth, "one of two models")
    assert [hp.plan_of(model) for model in [*videos, other]] == plans
    hp.detach(videos[0])
    require_close(videos[1](x), wanted[1], "the other after detach")
    assert hp.plan_of(videos[1]) == plans[1]


def test_two_models_with_two_plans():
    launch(_two_models, 2, timeout_s=60)


def unpickled(data: bytes):
    return pickle.loads(data)  # noqa: S301  # our own


def _copies() -> None:
    mesh = hp.init_mesh(sp=2, timeout_s=30)
    x = seeded((2, 7, 5, 2))
    model = randomised(Video(drop=0.3), 0.3)
    plan = hp.plan(model, x, mesh, attends=ATTENDS)
    hp.parallelize(model, plan, mesh)
    torch.manual_seed(0)
    wanted = model(x)
    copied = copy.deepcopy(model)
    assert hp.plan_of(copied) == plan
    for parameter in copied.parameters():
        parameter.data.mul_(1.5)
    torch.manual_seed(0)
    assert not torch.allclose(copied(x), wanted)
    torch.manual_seed(0)
    require_close(model(x), wanted, "the original after a change of its copy")
    hp.detach(copied)
    assert hp.plan_of(model) == plan
    torch.manual_seed(0)
    require_close(model(x), wanted, "the original after its copy was detached")

    loaded = unpickled(pickle.dumps(model))
    assert hp.plan_of(loaded) == plan
    assert hp.detach(loaded) == plan
    hp.parallelize(loaded, plan, mesh)
    torch.manual_seed(0)
    require_close(loaded(x), wanted, "pickled, and attached to this mesh")


def test_copies_keep_the_plan():
    launch(_copies, 2, timeout_s=60)


def test_a_pickled_model_says_that_its_mesh_is_gone():
    def once() -> str:
        mesh = hp.init_mesh(sp=2, timeout_s=30)
        x = seeded((2, 7, 5, 2))
        loaded = unpickled(pickle.dumps(_live(lambda: randomised(Video()), ATTENDS, x, mesh)))
        try:
            loaded(x)
        except hp.HairpinError as error:
            return str(error)
        return "ran"

    assert all("only a description" in answer for answer in launch(once, 2, timeout_s=60))


def _hooks(model) -> list[int]:
    return [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]


def _detached() -> None:
    mesh = hp.init_mesh(sp=2, timeout_s=30)
    model = randomised(VideoDiT(tiny()))
    b, t = 2, 7
    arguments = (
        seeded((b, t, 8, 8)),
        torch.rand(b, dtype=torch.float64),
        torch.arange(b)[:, None],
        (torch.arange(t) < 2).expand(b, t),
    )
    own = model.blocks[0].register_forward_pre_hook(lambda module, args: None)
    before = _hooks(model), list(model.state_dict()), [set(m.__dict__) for m in model.modules()]
    wanted = model(*arguments)
    plan = hp.plan(model, arguments, mesh, attends=video_dit.ATTENDS)
    assert _hooks(model) == before[0]
    for _ in range(2):
        hp.parallelize(model, plan, mesh)
        assert list(model.state_dict()) == before[1]
        assert _hooks(model) != before[0]
        require_close(model(*arguments), wanted, "split")
        assert hp.detach(model) == plan
        assert hp.plan_of(model) is None
        after = _hooks(model), list(model.state_dict()), [set(m.__dict__) for m in model.modules()]
        assert after == before
        sent = mesh.traffic.snapshot()
        assert torch.equal(model(*arguments), wanted)
        assert mesh.traffic.since(sent).bytes_sent == 0
    assert hp.detach(model) is None
    own.remove()


def test_detach_restores_the_model():
    launch(_detached, 2, timeout_s=60)


def _after_an_error() -> None:
    mesh = hp.init_mesh(sp=2, timeout_s=30)
    x = seeded((2, 7, 5, 2))
    model = _live(lambda: randomised(Video(mode=False), 0.3), ATTENDS, x, mesh)
    wanted = model(x).detach()
    failing = model.blocks[1].temporal.register_forward_pre_hook(_fail)
    with pytest.raises(KeyError):
        model(seeded((1, 7, 5, 2)))
    failing.remove()
    output = model(x)
    require_close(output, wanted, "after a forward that failed")
    output.sum().backward()


def _fail(module, args):
    raise KeyError


def test_a_forward_that_failed_leaves_no_trace():
    launch(_after_an_error, 2, timeout_s=60)


def _plans_alike() -> str:
    mesh = hp.init_mesh(sp=3, timeout_s=30)
    x = seeded((2, 7, 5, 2))
    return hp.plan(Video(), x, mesh, attends=ATTENDS).digest


def test_every_rank_makes_the_same_plan_live_or_described():
    digests = set(launch(_plans_alike, 3, timeout_s=60))
    x = seeded((2, 7, 5, 2))
    assert digests == {hp.plan(Video(), x, hp.Mesh(sp=3), attends=ATTENDS).digest}


def _many_steps() -> tuple[int, float]:
    """Objects that a thousand forwards would leave behind, had they left any."""
    import gc

    mesh = hp.init_mesh(sp=2, timeout_s=30)
    x = seeded((1, 4, 3, 2))
    model = _live(lambda: randomised(Video(depth=1, mode=True)), ATTENDS, x, mesh)
    counts = []
    begun = time.perf_counter()
    for turn in range(60):
        model(x).sum().backward()
        if turn in {19, 59}:
            gc.collect()
            counts.append(len(gc.get_objects()))
    return counts[1] - counts[0], time.perf_counter() - begun


def test_steps_leave_nothing_behind():
    for growth, _ in launch(_many_steps, 2, timeout_s=60):
        assert growth < 40
