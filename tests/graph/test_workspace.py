"""Peaks counted on fake tensors against the profiler, one operation at a time, to the byte."""

import pytest
import torch
import torch.nn.functional as F

from hairpin.graph.meter import measure
from hairpin.graph.workspace import workspace_bytes
from hairpin.run.profile import peak_cpu_bytes

aten = torch.ops.aten
BF16, F64 = torch.bfloat16, torch.float64


def r(*shape, dtype=torch.float32):
    return torch.rand(*shape, dtype=torch.float32).add(0.1).to(dtype)


def t(*shape, dtype=torch.float32):
    """A matrix (or a batch of them) of this shape, transposed in memory."""
    *batch, rows, columns = shape
    return r(*batch, columns, rows, dtype=dtype).transpose(-1, -2)


def every2(*shape, dtype=torch.float32):
    """Of this shape, with every second element of longer rows."""
    *rest, columns = shape
    return r(*rest, 2 * columns, dtype=dtype)[..., ::2]


def ints(*shape, high=5):
    return torch.randint(0, high, shape)


def last(x):
    return x.to(memory_format=torch.channels_last)


LAYOUTS = {
    "contiguous": r(3, 50, 70),
    "transposed": t(3, 50, 70),
    "every second": every2(3, 50, 70),
    "rows apart": r(6, 50, 70)[::2],
    "broadcast": r(3, 1, 70).expand(3, 50, 70),
    "dims moved": r(3, 50, 70).permute(2, 0, 1),
    "float64": r(3, 50, 70, dtype=F64),
    "bfloat16": r(3, 50, 70, dtype=BF16),
    "matrix transposed": t(63, 61),
}


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def check(fn, *args):
    """Both peaks of ``fn(*args)`` agree; the first call warms up what torch keeps."""
    with torch.no_grad():
        fn(*args)
        real = peak_cpu_bytes(lambda: fn(*args))
    assert measure(fn, args).peak_bytes == real


UNARY = {
    "add a number": lambda x: x + 2,
    "compare": lambda x: x > 0.5,
    "int by number": lambda x: x.long() * 2.5,
    "square": lambda x: x**2,
    "power of": lambda x: 2.0**x,
    "gelu": F.gelu,
    "silu": F.silu,
    "isinf": torch.isinf,
    "clamp": lambda x: x.clamp(0, 1),
    "masked_fill": lambda x: x.masked_fill(x > 0.5, 0.0),
    "where": lambda x: torch.where(x > 0.5, x, 0.0),
    "in place": lambda x: x.clone().mul_(2.0).add_(x).relu_(),
    "other dtype": lambda x: x + x.to(F64),
    "other dtype in place": lambda x: x.clone().add_(x.to(F64)),
    "int and float": lambda x: x.long() + x,
    "divide ints": lambda x: x.long() / x.long(),
    "cast": lambda x: x.double(),
    "contiguous": lambda x: x.contiguous(),
    "reshape": lambda x: x.reshape(-1),
    "sum": torch.sum,
    "sum of first": lambda x: x.sum(0),
    "sum of last": lambda x: x.sum(-1, keepdim=True),
    "sum of first and last": lambda x: x.sum((0, -1)),
    "sum in float64": lambda x: x.sum(0, dtype=F64),
    "count": lambda x: (x > 0.5).sum(0),
    "mean": torch.mean,
    "mean of first": lambda x: x.mean(0),
    "var": torch.var,
    "var of last": lambda x: x.var(-1),
    "var_mean": lambda x: torch.var_mean(x, -1),
    "amax": lambda x: x.amax(0),
    "max": torch.max,
    "max of last": lambda x: x.max(-1),
    "argmax": torch.argmax,
    "argmax of first": lambda x: x.argmax(0),
    "prod": lambda x: x.prod(0),
    "any": torch.any,
    "cumsum": lambda x: x.cumsum(0),
    "cumsum in float64": lambda x: x.cumsum(0, dtype=F64),
    "norm": lambda x: torch.linalg.vector_norm(x, 2, [-1]),
    "logsumexp": lambda x: x.logsumexp(0),
    "softmax of last": lambda x: x.softmax(-1),
    "softmax of first": lambda x: x.softmax(0),
    "log_softmax": lambda x: x.log_softmax(-1),
    "safe softmax": lambda x: aten._safe_softmax(x, -1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
    "topk": lambda x: x.topk(3),
    "sort": lambda x: x.sort(0),
    "sort of last": lambda x: x.sort(-1),
    "median": lambda x: x.median(0),
    "cat": lambda x: torch.cat([x, x], -1),
    "stack": lambda x: torch.stack([x, x], 1),
    "pad": lambda x: F.pad(x, (1, 2)),
    "roll": lambda x: x.roll((1, 2), (0, 1)),
    "roll flat": lambda x: x.roll(1),
    "flip": lambda x: x.flip(0),
    "repeat": lambda x: x.repeat(2, *[1] * (x.dim() - 1)),
    "dropout": lambda x: torch.native_dropout(x, 0.3, True),
    "mse": lambda x: F.mse_loss(x, x),
    "logits": lambda x: F.binary_cross_entropy_with_logits(x, x),
    "tril": torch.tril,
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", UNARY)
def test_one_operand(name, layout):
    check(UNARY[name], LAYOUTS[layout])


def einsum(pattern):
    return lambda a, b: torch.einsum(pattern, a, b)


PRODUCTS = {
    "mm": (aten.mm.default, r(34, 32), r(32, 128)),
    "mm transposed": (aten.mm.default, t(34, 32), t(32, 128)),
    "mm strided": (aten.mm.default, every2(34, 32), r(32, 128)),
    "mm both strided": (aten.mm.default, every2(34, 32), every2(32, 128)),
    "mm of a slice": (aten.mm.default, r(34, 64)[:, :32], r(32, 128)[:, :77]),
    "mm broadcast": (aten.mm.default, r(32).expand(34, 32), r(32, 5)),
    "mm float64": (aten.mm.default, every2(34, 32, dtype=F64), r(32, 128, dtype=F64)),
    "mm of a row": (aten.mm.default, r(1, 32), r(32, 128)),
    "mm outer": (aten.mm.default, r(34, 1), r(1, 128)),
    "mm ints": (aten.mm.default, ints(3, 4), ints(4, 5)),
    "mm empty": (aten.mm.default, r(0, 4), r(4, 5)),
    "addmm": (aten.addmm.default, r(128), every2(34, 32), t(32, 128)),
    "mv": (torch.mv, every2(30, 40), r(40)),
    "bmm": (torch.bmm, r(6, 70, 50), r(6, 50, 90)),
    "bmm transposed": (torch.bmm, t(6, 70, 50), t(6, 50, 90)),
    "bmm strided": (torch.bmm, every2(6, 70, 50), r(6, 50, 90)),
    "bmm batch inside": (torch.bmm, r(70, 50, 6).permute(2, 0, 1), r(6, 50, 90)),
    "bmm small": (torch.bmm, r(2, 3, 600).permute(2, 0, 1), r(600, 3, 2)),
    "bmm broadcast": (torch.bmm, r(1, 70, 50).expand(6, 70, 50), r(6, 50, 90)),
    "baddbmm": (torch.baddbmm, r(90), every2(6, 70, 50), t(6, 50, 90)),
    "matmul": (torch.matmul, r(2, 3, 17, 15), r(2, 3, 15, 14)),
    "matmul heads": (torch.matmul, r(2, 17, 3, 15).transpose(1, 2), r(2, 3, 15, 14)),
    "matmul by a matrix": (torch.matmul, r(2, 17, 3, 15).transpose(1, 2), r(15, 14)),
    "einsum scores": (einsum("bihd,bjhd->bhij"), r(2, 17, 3, 5), r(2, 18, 3, 5)),
    "einsum outer": (einsum("sic,sjd->ijcd"), r(4, 17, 3), r(4, 16, 5)),
    "einsum triangle": (einsum("ikc,jkc->ijc"), r(17, 19, 3), r(18, 19, 3)),
    "linear": (F.linear, r(2, 17, 15), r(16, 15), r(16)),
    "linear no bias": (F.linear, r(17, 2, 15).transpose(0, 1), r(16, 15)),
    "linear strided": (F.linear, r(2, 15, 17).transpose(1, 2), r(16, 15), r(16)),
    "linear of a slice": (F.linear, r(2, 17, 30)[..., :15], r(16, 15), r(16)),
    "linear strided weight": (F.linear, r(2, 17, 15), every2(16, 15), r(16)),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name):
    check(*PRODUCTS[name])


def test_a_product_written_to_a_strided_result():
    a, b, out = r(34, 32), r(32, 128), every2(34, 128)
    check(lambda a, b, out: aten.mm.out(a, b, out=out), a, b, out)


def heads(batch, length, dim, dtype=torch.float32):
    return r(batch, length, 3, dim, dtype=dtype).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.float32, F64, BF16])
@pytest.mark.parametrize(
    ("queries", "keys"), [(17, 17), (64, 31), (200, 200), (300, 77), (20, 1300), (800, 40)]
)
def test_attention(queries, keys, dtype, threads):
    q, k = heads(2, queries, 16, dtype), heads(2, keys, 16, dtype)
    check(F.scaled_dot_product_attention, q, k, k)


MASKS = {
    "float": r(200, 77),
    "float per head": r(2, 3, 200, 77),
    "bool": r(200, 77) > 0.5,
    "bool broadcast": r(2, 1, 1, 77) > 0.5,
}


@pytest.mark.parametrize("name", MASKS)
def test_attention_with_a_mask(name):
    q, k = heads(2, 200, 16), heads(2, 77, 16)
    check(F.scaled_dot_product_attention, q, k, k, MASKS[name])


def test_attention_that_torch_computes_in_parts():
    check(F.scaled_dot_product_attention, r(2, 3, 60, 16), r(2, 3, 60, 16), r(2, 3, 60, 8))
    check(F.scaled_dot_product_attention, *(heads(2, 60, 16)[0] for _ in range(3)))


ROWS, J = ints(11), ints(30, 3, 70)
PICKS = {
    "index_select": lambda x: x.index_select(1, ROWS),
    "index_select of first": lambda x: x.index_select(0, ROWS),
    "index": lambda x: x[:, ROWS],
    "index by two": lambda x: x[ROWS, ROWS],
    "index by int32": lambda x: x[ROWS.int()],
    "gather": lambda x: x.gather(1, J),
    "scatter": lambda x: x.scatter(1, J, x),
    "scatter_add": lambda x: x.scatter_add(1, J, x),
    "index_add": lambda x: x.index_add(1, ROWS[:3], x[:, :3]),
    "index_put": lambda x: x.index_put((ROWS,), x[:11], accumulate=True),
    "embedding": lambda x: F.embedding(ROWS, x[:, 0]),
    "slice_scatter": lambda x: torch.slice_scatter(x, x[:2], 0, 0, 2),
    "cross_entropy": lambda x: F.cross_entropy(x[:, :, 0], ints(30, high=5)),
    "nll": lambda x: F.nll_loss(x[:, :, 0], J[:, 0, 0]),
}


@pytest.mark.parametrize("dtype", [torch.float32, F64, BF16])
@pytest.mark.parametrize("name", PICKS)
def test_picking(name, dtype):
    for x in (r(30, 5, 70, dtype=dtype), r(5, 30, 70, dtype=dtype).transpose(0, 1)):
        check(PICKS[name], x)


IMAGES = {
    "contiguous": r(4, 6, 10, 70),
    "transposed": r(6, 4, 10, 70).transpose(0, 1),
    "channels last": last(r(4, 6, 10, 70)),
}
WEIGHT = r(6)
OF_IMAGES = {
    "batch_norm": lambda x: F.batch_norm(x, WEIGHT, WEIGHT, WEIGHT, WEIGHT),
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "max_pool": lambda x: F.max_pool2d(x, 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2, mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "bicubic": lambda x: F.interpolate(x, scale_factor=2, mode="bicubic"),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x[:, :4], 2),
    "reflect": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "patches": lambda x: F.unfold(x, 2, stride=2),
}


@pytest.mark.parametrize("layout", IMAGES)
@pytest.mark.parametrize("name", OF_IMAGES)
def test_images(name, layout):
    check(OF_IMAGES[name], IMAGES[layout])


@pytest.mark.parametrize("layout", ["contiguous", "channels last"])
def test_group_norm(layout):
    check(lambda x: F.group_norm(x, 2, WEIGHT, WEIGHT), IMAGES[layout])


# images, channels in and out, kernel, stride, padding, dilation, groups, length
CONVOLUTIONS = [
    (2, 4, 6, 3, 1, 1, 1, 1, 13),
    (1, 4, 6, 3, 1, 1, 1, 1, 13),
    (2, 16, 32, 3, 2, 1, 1, 1, 17),
    (2, 4, 6, 1, 1, 0, 1, 1, 13),
    (2, 4, 8, 3, 1, 1, 1, 2, 13),
    (2, 4, 6, 3, 1, 2, 2, 1, 13),
    (2, 3, 32, 4, 4, 0, 1, 1, 16),
    (20, 16, 16, 3, 1, 1, 1, 1, 9),
    (1, 20, 40, 3, 1, 1, 1, 1, 33),
    (1, 64, 3, 3, 1, 1, 1, 1, 32),
]
onednn = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="oneDNN lays channels out by the width of the processor's registers; known for AVX-512",
)


@onednn
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case, dtype, dims):
    images, inner, outer, kernel, stride, padding, dilation, groups, length = case
    x = r(images, inner, *[length] * dims, dtype=dtype)
    weight = r(outer, inner // groups, *[kernel] * dims, dtype=dtype)
    bias = r(outer, dtype=dtype)
    conv = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    check(lambda x, w, b: conv(x, w, b, stride, padding, dilation, groups), x, weight, bias)


@onednn
@pytest.mark.parametrize("layout", ["channels last", "transposed"])
def test_convolution_of_a_strided_image(layout, threads):
    x = {"channels last": last(r(2, 16, 33, 32)), "transposed": r(2, 16, 32, 33).mT}[layout]
    check(lambda x, w: F.conv2d(x, w, padding=1), x, r(32, 16, 3, 3))


@onednn
def test_transposed_convolution():
    x, weight = r(2, 16, 17, 17), r(16, 32, 3, 3)
    check(lambda x, w: F.conv_transpose2d(x, w, padding=1), x, weight)
    check(lambda x, w: F.conv_transpose2d(x, w, stride=2), x, weight)
    check(lambda x, w: F.conv_transpose2d(x, w, stride=2), x.double(), weight.double())


def test_reductions_that_threads_share(threads):
    x = r(300, 300)
    for fn in (torch.sum, torch.mean, torch.any, torch.amax, torch.prod, torch.var, torch.max):
        check(fn, x)
    check(torch.mean, x.bfloat16())
    check(lambda x: torch.logsumexp(x, (0, 1)), x)


def test_a_result_elsewhere_than_on_the_cpu_takes_nothing():
    args = (every2(34, 32), r(32, 128))
    out = torch.mm(*args)
    assert workspace_bytes(aten.mm.default, args, {}, out) == 34 * 32 * 4
    assert workspace_bytes(aten.mm.default, args, {}, out.to("meta")) == 0


def test_arguments_by_name_count_as_those_by_place():
    x = r(3, 50, 70)
    out = x.sum(0, dtype=F64)
    by_place = workspace_bytes(aten.sum.dim_IntList, (x, [0]), {"dtype": F64}, out)
    by_name = workspace_bytes(aten.sum.dim_IntList, (x,), {"dim": [0], "dtype": F64}, out)
    assert by_place == by_name == x.numel() * 8
