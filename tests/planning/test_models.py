"""Unusual but fair models: residuals, skips, side arguments, tokens, nothing at all."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import hairpin as hp
from hairpin.run.launch import launch
from marks import slow
from planning.toys import ATTENDS, Along, Video, video_arguments, video_case
from planning.truth import Case, check, randomised, require_close, seeded

PAIR = {"first": "b t [s] c", "second": "b [t] s c"}


class Pair(nn.Module):
    """Along the patches, then along the frames."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Along(2)
        self.second = Along(1)

    def forward(self, x):
        return self.second(self.first(x))


class Residual(Pair):
    def forward(self, x):
        x = x * 2
        x = x + self.first(x)
        return x + self.second(x)


class Skip(nn.Module):
    """Like a U-Net: what the first stages gave is added to what the last ones take."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([Along(2), Along(1)])
        self.up = nn.ModuleList([Along(1), Along(2)])

    def forward(self, x):
        skips = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        for stage in self.up:
            x = stage(x + skips.pop())
        return x


class InPlace(Pair):
    def forward(self, x):
        y = self.first(x.clone().mul_(2))
        y += 1
        y[..., 0] *= 2
        y.relu_()
        return self.second(y).mul_(2)


class Passing(nn.Module):
    """A stage that gives back the very tensor it got."""

    def forward(self, x):
        return x


class WithPassing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Along(2)
        self.passing = Passing()
        self.second = Along(1)

    def forward(self, x):
        return self.second(self.passing(self.first(x)))


class Masked(nn.Module):
    """Along the patches, with arguments that carry the frames, the patches, neither, or nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.along = Along(2)

    def forward(self, x, mask=None, *, gain=None, bias, verbose=False):
        if mask is not None:
            x = x * mask
        if gain is not None:
            x = x + gain
        return self.along(x), bias


class MaskedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = Masked()
        self.second = Along(1)

    def forward(self, x, mask=None, gain=None, bias=None):
        y, bias = self.first(x, mask, gain=gain, bias=bias, verbose=True)
        return self.second(y) + bias


class ByKeyword(nn.Module):
    """The stream comes after another tensor, by keyword, under another name."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.along = Along(2)

        def forward(self, condition, **words):
            return self.along(words["hidden"]) * condition

    def __init__(self) -> None:
        super().__init__()
        self.first = self.Stage()
        self.second = Along(1)

    def forward(self, x):
        return self.second(self.first(x.new_ones(4) * 3, hidden=x))


@dataclass
class Output:
    sample: torch.Tensor
    extra: torch.Tensor


class Structured(Pair):
    def forward(self, x, kind="dict"):
        y = self.second(self.first(x))
        if kind == "dict":
            return {"sample": y, "extra": [y.sum(1), (y * 2, None, "text")]}
        return y, y.mean()


class Tokens(nn.Module):
    """The first stage takes whole numbers, and the last gives scores."""

    class Embed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 4)
            self.along = Along(2)

        def forward(self, tokens):
            return self.along(self.table(tokens))

    def __init__(self) -> None:
        super().__init__()
        self.first = self.Embed()
        self.second = Along(1)

    def forward(self, tokens):
        return self.second(self.first(tokens))


class Produced(nn.Module):
    """A side argument that another stage made, and that a later stage takes."""

    class Maker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.along = Along(2)

        def forward(self, x):
            y = self.along(x)
            return y, y.mean(2, keepdim=True)

    class Taker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.along = Along(2)

        def forward(self, x, mean):
            return self.along(x - mean)

    def __init__(self) -> None:
        super().__init__()
        self.maker = self.Maker()
        self.second = Along(1)
        self.taker = self.Taker()

    def forward(self, x):
        y, mean = self.maker(x)
        return self.taker(self.second(y), mean)


class Conv(nn.Module):
    """Channels second, as in convolutions: ``b c t s``; a convolution along the patches."""

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))

        def forward(self, x):
            return x + self.conv(x)

    class Mean(nn.Module):
        def forward(self, x):
            return x - x.cumsum(2)

    def __init__(self) -> None:
        super().__init__()
        self.first = self.Stage()
        self.second = self.Mean()

    def forward(self, x):
        return self.second(self.first(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)


class Half(Pair):
    """Frames are halved by merging pairs into channels: the length of t changes on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.merge = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        b, t, s, c = x.shape
        x = self.merge(x.view(b, t // 2, 2, s, c).transpose(2, 3).reshape(b, t // 2, s, 2 * c))
        return self.second(x)


def x(*shape):
    shape = shape or (2, 6, 5, 4)
    return lambda: ((seeded(shape),), {})


def case(name, kind, arguments=None, attends=None, **words):
    return Case(name, lambda: randomised(kind(), 0.3), arguments or x(), attends or PAIR, **words)


def masked(name, mask, gain, bias=(4,)):
    def arguments():
        words = {"mask": mask, "gain": gain, "bias": bias}
        given = {key: seeded(shape, 7) for key, shape in words.items() if shape}
        return (seeded((2, 6, 5, 4)),), given

    seam = hp.Seam("b t [s] c", args={"mask": "b t 1 1", "gain": "t s 1"}, out=("b t s c", None))
    return case(name, MaskedModel, arguments, {**PAIR, "first": seam})


def structured(kind):
    return lambda: ((seeded((2, 6, 5, 4)), kind), {})


SKIP = {
    "down.0": "b t [s] c",
    "down.1": "b [t] s c",
    "up.0": "b [t] s c",
    "up.1": "b t [s] c",
}
PASSING = {**PAIR, "passing": "b t s c"}
KEYWORD = {**PAIR, "first": hp.Seam("b t [s] c", stream_arg="hidden")}
MODELS = (
    case("residuals around stages", Residual),
    case("residuals, with as many frames as patches as ranks", Residual, x(2, 4, 4, 4)),
    case("skips", Skip, attends=SKIP),
    case("changes in place", InPlace),
    case("a stage that gives back what it got", WithPassing, attends=PASSING),
    masked("a mask and a gain", (2, 6, 1, 1), (6, 5, 1)),
    masked("a gain alone", None, (6, 5, 1)),
    masked("neither", None, None),
    case("the stream by keyword", ByKeyword, attends=KEYWORD),
    case("a dict of outputs", Structured, structured("dict")),
    case("a tuple of outputs", Structured, structured("tuple")),
    case("channels second", Conv, attends={"first": "b c t [s]", "second": "b c [t] s"}),
    Case(
        "tokens",
        lambda: randomised(Tokens(), 0.3),
        lambda: ((torch.arange(60).view(2, 6, 5) % 7,), {}),
        {"first": "b t [s] -> b t s c", "second": "b [t] s c"},
    ),
    case(
        "what a stage made",
        Produced,
        attends={
            "maker": hp.Seam("b t [s] c", out=("b t s c", "b t 1 c")),
            "second": "b [t] s c",
            "taker": hp.Seam("b t [s] c", args={"mean": "b t 1 c"}),
        },
    ),
)


@pytest.mark.parametrize("ranks", [1, slow(2), 3, slow(4)])
def test_models(ranks):
    check(MODELS, ranks)


EMPTY = tuple(
    video_case(f"video of {shape}", shape).but("empty", example=video_arguments(2, 6, 5))
    for shape in [(0, 6, 5), (2, 0, 5), (2, 6, 0)]
)


@pytest.mark.parametrize("ranks", [1, 3])
def test_nothing_goes_through_and_back(ranks):
    check(EMPTY, ranks)


HALVED = (
    case("frames halved", Half, x(2, 8, 5, 4), {"first": "b t [s] c", "second": "b [u] s c"}),
)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_length_that_changes_on_the_way(ranks):
    check(HALVED, ranks)


def _second_gradient(is_split) -> torch.Tensor:
    model = randomised(Video(depth=1), 0.3)
    inputs = seeded((2, 6, 5, 2)).requires_grad_()
    if is_split:
        mesh = hp.init_mesh(sp=3, timeout_s=30)
        hp.parallelize(model, hp.plan(model, inputs, mesh, attends=ATTENDS), mesh)
    loss = model(inputs).sin().sum()
    (grad,) = torch.autograd.grad(loss, inputs, create_graph=True)
    if is_split:
        grad = hp.all_reduce(grad, mesh, axis="sp", grad="replicated") / 3
    grad.square().sum().backward()
    if is_split:
        hp.sync_grads(model, mesh)
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_gradients_of_gradients():
    (wanted,) = launch(_second_gradient, 1, False)
    for got in launch(_second_gradient, 3, True, timeout_s=60):
        require_close(got, wanted, "a gradient penalty")


def _torch_mesh() -> None:
    import os

    import torch.distributed as dist

    dist.init_process_group("gloo")
    assert os.environ["WORLD_SIZE"] == "2"
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("cp",))
    inputs = seeded((2, 6, 5, 2))
    model = randomised(Video(), 0.3)
    wanted = model(inputs)
    plan = hp.plan(model, inputs, mesh, attends=ATTENDS, axis="cp")
    hp.parallelize(model, plan, mesh)
    require_close(model(inputs), wanted, "over torch's mesh")
    assert "cp" in plan.explain()


def test_a_mesh_of_torch_and_another_axis():
    launch(_torch_mesh, 2, timeout_s=60)


def _low_precision() -> None:
    mesh = hp.init_mesh(sp=2, timeout_s=30)
    inputs = seeded((2, 6, 5, 2)).float()
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.bfloat16, 2e-2)):
        model = randomised(Video(), 0.3).to(dtype)
        mine = inputs.to(dtype)
        wanted = model(mine)
        hp.parallelize(model, hp.plan(model, mine, mesh, attends=ATTENDS), mesh)
        got = model(mine)
        assert got.dtype == dtype
        error = (got - wanted).float().norm() / wanted.float().norm()
        assert float(error.detach()) < tolerance
    model = randomised(Video(), 0.3).float()
    with torch.autocast("cpu", torch.bfloat16):
        wanted = model(inputs)
        hp.parallelize(model, hp.plan(model, inputs, mesh, attends=ATTENDS), mesh)
        error = (model(inputs) - wanted).float().norm() / wanted.float().norm()
    assert float(error.detach()) < 2e-2


def test_other_types_and_autocast():
    launch(_low_precision, 2, timeout_s=60)
