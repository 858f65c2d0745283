"""Live bytes of whole runs on fake tensors against the profiler, to the byte."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hairpin.graph.meter import Meter, fake_inputs, measure
from hairpin.run.profile import _total, peak_cpu_bytes

aten = torch.ops.aten


class Block(nn.Module):
    """Attention and a perceptron, as third-party code writes them."""

    def __init__(self, dim=32, heads=4, *, fused=False):
        super().__init__()
        self.norm, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim, bias=False)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.heads, self.fused = heads, fused

    def forward(self, x):
        b, t, c = x.shape
        qkv = self.qkv(self.norm(x)).view(b, t, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-1, -2) / 3).softmax(-1) @ v
        x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Language(nn.Module):
    """Tokens in, losses out; the last layer shares the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(53, 32)
        self.blocks = nn.Sequential(Block(), Block(fused=True))
        self.head = nn.Linear(32, 53, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens):
        logits = self.head(self.blocks(self.embed(tokens)))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


class Triangle(nn.Module):
    """Outer product over one dim of a pair representation, gated."""

    def __init__(self, dim=12):
        super().__init__()
        self.norm, self.gate = nn.LayerNorm(dim), nn.Linear(dim, dim)
        self.left, self.right = nn.Linear(dim, dim), nn.Linear(dim, dim)

    def forward(self, z):
        z = self.norm(z)
        a, b = self.left(z).sigmoid(), self.right(z.transpose(0, 1))
        return torch.einsum("ikc,jkc->ijc", a, b) * self.gate(z).sigmoid()


MODELS = {
    "block": (Block, torch.rand(2, 17, 32)),
    "fused block": (lambda: Block(fused=True), torch.rand(3, 31, 32)),
    "blocks": (lambda: nn.Sequential(Block(), Block(), Block()), torch.rand(1, 43, 32)),
    "transposed input": (Block, torch.rand(19, 2, 32).transpose(0, 1)),
    "language": (Language, torch.randint(0, 53, (2, 29))),
    "triangle": (Triangle, torch.rand(23, 23, 12)),
    "post-norm": (
        lambda: nn.TransformerEncoderLayer(32, 4, 64, batch_first=True),
        torch.rand(2, 17, 32),
    ),
    "float64": (lambda: Block().double(), torch.rand(2, 17, 32, dtype=torch.float64)),
}


@pytest.mark.parametrize("mode", ["no_grad", "inference", "backward"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model(name, mode):
    build, x = MODELS[name]
    model, grad = build(), mode == "backward"
    context = torch.inference_mode if mode == "inference" else torch.enable_grad

    def step():
        with context(), torch.set_grad_enabled(grad):
            output = model(x)
            if grad:
                _total(output).backward()

    step()
    model.zero_grad(set_to_none=True)
    real = peak_cpu_bytes(step)
    model.zero_grad(set_to_none=True)
    with context():
        timeline = measure(model, (x,), grad=grad)
    assert timeline.peak_bytes == real
    assert sum(held.nbytes for held in timeline.at_peak) == real
    assert max(moment.live_bytes for moment in timeline.moments) == real
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_stay_alive_and_the_graph_does_not():
    model = Block()
    timeline = measure(model, (torch.rand(2, 17, 32),), grad=True)
    weights = sum(p.numel() for p in model.parameters()) * 4
    output, seed = 2 * 17 * 32 * 4, 4
    assert weights + output <= timeline.end_bytes <= weights + output + seed


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # torch.export's own
def test_an_exported_program_as_the_model_it_came_from():
    model, x = nn.Sequential(Block(), Block(fused=True)), torch.rand(2, 17, 32)
    program = torch.export.export(model, (x,)).run_decompositions({})
    exported = program.module()
    with torch.no_grad():
        exported(x)
        real = peak_cpu_bytes(lambda: exported(x))
    assert measure(exported, (x,)).peak_bytes == real


def peak(fn, *args):
    with torch.no_grad():
        real = peak_cpu_bytes(lambda: fn(*args))
    found = measure(fn, args).peak_bytes
    assert found == real
    return found


X = torch.rand(30, 40)
BYTES = 30 * 40 * 4


def test_views_and_results_that_are_the_input_take_nothing():
    assert peak(lambda x: x.t().unsqueeze(0).expand(3, 40, 30), X) == 0
    assert peak(lambda x: x.contiguous(), X) == 0
    assert peak(lambda x: x.reshape(-1), X) == 0
    assert peak(lambda x: x.float(), X) == 0
    assert peak(lambda x: aten._unsafe_view(x, [1200]), X) == 0
    assert peak(lambda x: x.split(7)[1], X) == 0


def test_a_view_keeps_its_storage_alive():
    def fn(x):
        y = x.exp()[:1]
        return y + x.exp().sum()  # the first exp is still whole

    assert peak(fn, X) == 2 * BYTES + 4


def test_a_storage_is_released_with_its_last_tensor():
    assert peak(lambda x: x.exp().exp().exp().exp(), X) == 2 * BYTES


def test_writing_in_place_takes_nothing():
    assert peak(lambda x: x.clone().relu_().mul_(x).add_(x).sub_(x), X) == BYTES

    def reused(x):
        y = torch.empty_like(x)
        return torch.exp(torch.exp(x, out=y), out=y)

    assert peak(reused, X) == BYTES


def test_a_result_given_an_empty_tensor_makes_room_for_itself():
    def grown(x):
        y = x.new_empty(0)
        torch.exp(x, out=y)
        return y

    assert peak(grown, X) == BYTES


def test_a_slice_of_an_output_is_written_as_the_loops_do():
    def loop(x):
        out = x.new_empty(30, 40)
        for start in range(0, 30, 7):
            part = x[start : start + 7]
            out[start : start + 7].copy_((part @ part.t()).softmax(-1) @ part)
        return out

    part = 7 * 40 * 4
    assert BYTES + part < peak(loop, X) < 2 * BYTES


@pytest.mark.parametrize("bias", [True, False])
def test_linear_of_rows_that_do_not_follow_each_other(bias):
    """Torch adds the bias in place there, unless somebody looks on."""
    x, w, b = torch.rand(2, 17, 30)[..., :15], torch.rand(16, 15), torch.rand(16)
    fused = peak(lambda x, w, b: F.linear(x, w, b if bias else None), x, w, b)
    assert fused == 2 * 17 * 16 * 4
    assert peak(lambda x, w, b: x @ w.t() + b, x, w, b) == 2 * fused


def test_gradients_that_meet_are_added_in_place():
    model = nn.Linear(15, 15)

    def fn(x):
        y = model(x)
        return y.sin() + y.cos() * y.exp() + y

    class Wrapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return fn(x)

    x = torch.rand(40, 15)

    def step():
        output = fn(x)
        _total(output).backward()

    step()
    model.zero_grad(set_to_none=True)
    assert measure(Wrapped(), (x,), grad=True).peak_bytes == peak_cpu_bytes(step)


def test_nothing_is_allocated():
    """A run of 3 GiB takes less than 64 KiB to measure."""
    x = torch.empty(1, device="meta").expand(2**14, 2**14)
    found = []
    taken = peak_cpu_bytes(lambda: found.append(measure(lambda x: x.exp().exp() + 1, (x,))))
    assert found[0].peak_bytes == 2 * 2**30 + 12
    assert taken < 2**16


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_parameters_need_not_be_real(where):
    x = torch.rand(2, 17, 32)
    expected = measure(Block(), (x,)).peak_bytes
    if where == "meta":
        with torch.device("meta"):
            model = Block()
    else:
        with FakeTensorMode():
            model = Block()
    assert measure(model, (x,)).peak_bytes == expected


def test_another_device_has_no_workspace_of_ours():
    x = torch.rand(300, 40).t()
    on_cpu = measure(lambda x: x.softmax(-1), (x,)).peak_bytes
    on_cuda = measure(lambda x: x.softmax(-1), (x,), device=torch.device("cuda")).peak_bytes
    assert on_cuda == x.numel() * 4
    assert on_cpu > 2 * on_cuda


def test_keyword_arguments_and_strides_are_kept():
    seen = []

    def fn(x, *, y):
        seen.append((x.stride(), y["a"].dtype, y["a"].shape))
        return x

    measure(fn, (X.t(),), {"y": {"a": torch.ones(2, 3, dtype=torch.int8)}})
    assert seen == [((1, 40), torch.int8, (2, 3))]


def test_what_was_held_at_the_peak():
    mode = FakeTensorMode()
    (x,) = fake_inputs((X,), mode)
    with mode, Meter() as meter:
        meter.label = "first"
        y = x.exp()
        meter.label = "second"
        z = y.sum(0)
        meter.label = "third"
        w = y.t().softmax(-1)
    timeline = meter.timeline()
    held = [(h.label, h.op, h.nbytes, h.shape, h.dtype) for h in timeline.at_peak]
    assert timeline.peak_bytes == 3 * BYTES + z.numel() * 4
    assert ("first", "aten.exp", BYTES, (30, 40), "float32") in held
    assert ("third", "aten._softmax", BYTES, (40, 30), "float32") in held
    assert ("third", "aten._softmax workspace", BYTES, (BYTES,), "uint8") in held
    assert held[-1] == ("second", "aten.sum", 160, (40,), "float32")
    assert len(held) == 4
    assert timeline.end_bytes == meter.live_bytes == 2 * BYTES + 160
    assert [m.label for m in timeline.moments] == ["first", "second", "third", "third"]
    assert w.shape == (40, 30)


def test_the_peak_can_be_forgotten_and_bumped():
    with FakeTensorMode(), Meter() as meter:
        x = torch.empty(100)
        x.exp()
        assert (meter.peak_bytes, meter.live_bytes) == (800, 400)
        meter.reset_peak()
        assert (meter.peak_bytes, meter.live_bytes) == (400, 400)
        assert [h.nbytes for h in meter.timeline().at_peak] == [400]
        meter.bump(100)
        assert (meter.peak_bytes, meter.live_bytes) == (500, 400)
        assert [h.nbytes for h in meter.timeline().at_peak] == [400, 100]
        del x
        assert meter.live_bytes == 0


def test_real_tensors_are_counted_too():
    with Meter() as meter:
        y = X.exp()
        y.t().contiguous()
    assert meter.peak_bytes == 2 * BYTES
    assert meter.live_bytes == BYTES


def test_views_of_images_have_the_strides_that_kernels_give_them():
    """A dim of length 1 decides whether what follows is laid out channels last."""
    torch.manual_seed(0)
    convolve = nn.Conv2d(16, 16, 3, padding=1)

    def attended(x):
        rows = x.flatten(2).transpose(1, 2).exp()
        return convolve(up((rows.transpose(1, 2).reshape(x.shape) + x) / 2.0))

    def up(x):
        return F.interpolate(x, scale_factor=2.0)

    x = torch.randn(1, 16, 13, 13)
    with torch.no_grad():
        attended(x)
        real = peak_cpu_bytes(lambda: attended(x))
        assert measure(attended, (x,)).peak_bytes == real
