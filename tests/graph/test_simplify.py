"""Exported graphs without what eager does not compute: same numbers, same aliases, less memory."""

import itertools
from importlib.util import find_spec

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from hairpin.bench import zoo
from hairpin.graph.export import packed_outputs, trace
from hairpin.graph.known import Affine, Choice, Known, Value
from hairpin.graph.meter import measure
from hairpin.graph.simplify import simplify
from marks import slow

aten = torch.ops.aten
needs_transformers = pytest.mark.skipif(
    find_spec("transformers") is None, reason="transformers is not installed"
)
LENGTHS = (2, 3, 7, 19)


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


def traced(function, *args):
    block = function if isinstance(function, nn.Module) else Call(function)
    return trace(block.eval(), args, {})


def simplified(function, *args):
    found = traced(function, *args)
    simplify(found.graph)
    found.graph.lint()
    return found


def run(found, block, args, kwargs=None):
    call = fx.GraphModule(nn.Module(), found.graph)
    flat = found.flat_inputs(block, block.forward, args, kwargs or {})
    with torch.no_grad():
        return packed_outputs(found, call(*flat))


def names(found):
    targets = [node.target for node in found.graph.nodes if node.op == "call_function"]
    return [str(getattr(target, "overloadpacket", target)) for target in targets]


def attention(found):
    """Named arguments of the attention calls that are left."""
    op = aten.scaled_dot_product_attention.default
    schema = [argument.name for argument in op._schema.arguments]
    return [
        dict(zip(schema, node.args, strict=False)) | node.kwargs
        for node in found.graph.nodes
        if node.target is op
    ]


def squares(found):
    """Results whose last two dims are both lengths, the same or two, and that are no views."""
    values = [n.meta.get("val") for n in found.graph.nodes if n.op == "call_function"]
    return [
        v
        for v in values
        if isinstance(v, Tensor)
        and v.dim() > 1
        and all(isinstance(n, torch.SymInt) for n in v.shape[-2:])
        and 0 not in v.stride()
    ]


# ----------------------------------------------------------------------- values that are no data


def written_out(value: Value, shape) -> Tensor:
    """A value as a tensor, position by position in Python."""

    def at(affine, place):
        return affine.start + sum(step * place[dim] for dim, step in affine.steps.items())

    places = itertools.product(*(range(n) for n in shape))
    if isinstance(value, Affine):
        numbers = [at(value, place) for place in places]
    else:
        assert isinstance(value, Choice)
        numbers = [
            value.yes if all(at(bound, place) <= 0 for bound in value.bounds) else value.no
            for place in places
        ]
    return torch.tensor(numbers).reshape(shape)


def i(x):
    return torch.arange(x.shape[0])


MASKS = {
    "ones": lambda x: torch.ones(x.shape[0], 3),
    "full_like": lambda x: torch.full_like(x, -2.5),
    "arange": lambda x: torch.arange(2, 2 + 3 * x.shape[0], 3),
    "sum of two": lambda x: i(x)[:, None] * 4 - i(x)[None] + 7,
    "negative": lambda x: -i(x),
    "rsub": lambda x: 5 - i(x),
    "causal": lambda x: i(x)[None] <= i(x)[:, None],
    "anticausal": lambda x: i(x)[None] > i(x)[:, None] + 1,
    "window": lambda x: (i(x)[None] <= i(x)[:, None]) & (i(x)[None] > i(x)[:, None] - 3),
    "outside": lambda x: (i(x)[None] > i(x)[:, None]) | (i(x)[None] <= i(x)[:, None] - 3),
    "not": lambda x: ~(i(x)[None] <= i(x)[:, None]),
    "diagonal": lambda x: i(x)[None] == i(x)[:, None],
    "off the diagonal": lambda x: i(x)[None] != i(x)[:, None],
    "prefix": lambda x: (i(x) < 5)[None, None],
    "all": lambda x: i(x) >= 0,
    "none": lambda x: i(x) < -1,
    "tril": lambda x: torch.ones(x.shape[0], x.shape[0]).tril(-1),
    "triu": lambda x: torch.full((x.shape[0], x.shape[0]), float("-inf")).triu(1),
    "tril of bools": lambda x: torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).tril(2),
    "filled": lambda x: torch.zeros(x.shape[0], x.shape[0]).masked_fill(
        i(x)[None] > i(x)[:, None], -1e9
    ),
    "where": lambda x: torch.where(i(x)[None] <= i(x)[:, None], 0.0, float("-inf")),
    "old style": lambda x: (1.0 - (i(x)[None] <= i(x)[:, None]).to(torch.float32)) * -1e4,
    "cumsum": lambda x: torch.ones(x.shape[0], 2, dtype=torch.long).cumsum(0),
    "diff": lambda x: i(x).diff(),
    "diff and one": lambda x: torch.diff(i(x), prepend=i(x)[:1] - 1) != 1,
    "sliced": lambda x: (i(x)[None] <= i(x)[:, None])[1:, :-1],
    "from the end": lambda x: (3 * i(x))[-2:],
    "selected": lambda x: (i(x)[None] + 10 * i(x)[:, None])[1],
    "last": lambda x: (i(x)[None] + 10 * i(x)[:, None])[:, -1],
    "transposed": lambda x: (i(x)[None] <= i(x)[:, None]).T[None].expand(2, -1, -1),
    "permuted": lambda x: (i(x)[None] + 2 * i(x)[:, None])[None].permute(2, 0, 1),
    "looked up": lambda x: (2 * i(x)[None] + i(x)[:, None])[i(x)[:, None], torch.zeros(1).long()],
    "by position": lambda x: (3 * i(x))[i(x)[None, :, None]],
    "viewed": lambda x: (i(x)[None] < i(x)[:, None]).view(1, x.shape[0], 1, x.shape[0]),
}


@pytest.mark.parametrize("name", MASKS)
def test_a_known_value_is_the_real_one_at_every_length(name):
    found = traced(MASKS[name], torch.randn(5))
    known = Known()
    for node in found.graph.nodes:
        known.learn(node)
    result = found.output.args[0][0]
    value = known.of(result)
    assert value is not None, f"nothing is known of {found.graph}"
    for n in LENGTHS:
        expected = MASKS[name](torch.randn(n))
        got = written_out(at_length(value, n), expected.shape)
        assert torch.equal(got.to(expected.dtype), expected), f"length {n}: {value}"


def at_length(value: Value, n: int) -> Value:
    """A value with symbols replaced."""

    def number(x):
        if not isinstance(x, torch.SymInt):
            return x
        return int(x.node.expr.subs(dict.fromkeys(x.node.expr.free_symbols, n)))

    def affine(a):
        return Affine(number(a.start), a.steps)

    if isinstance(value, Affine):
        return affine(value)
    return Choice(tuple(affine(bound) for bound in value.bounds), value.yes, value.no)


UNKNOWN = {
    "data": lambda x: x > 0,
    "given positions": lambda x: x.long()[None] <= x.long()[:, None],
    "random": lambda x: torch.rand(x.shape[0]) < 2,
    "smaller integers": lambda x: torch.arange(x.shape[0]).to(torch.uint8) * 100,
    "floats": lambda x: torch.arange(x.shape[0]) * 0.1,
    "from the end, by position": lambda x: (3 * i(x))[i(x) - 1],
    "joined": lambda x: i(x)[None] * x.shape[0] + i(x)[:, None] * x.shape[0],
    "bits": lambda x: torch.ones(x.shape[0]).view(torch.int32),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_depends_on_data_or_wraps_around_is_not_known(name):
    found = traced(UNKNOWN[name], torch.randn(5))
    known = Known()
    for node in found.graph.nodes:
        known.learn(node)
    assert known.of(found.output.args[0][0]) is None


# ------------------------------------------------------------------------------------------ masks


def attend(mask, **given):
    def forward(q, k, v):
        q, k, v = (x.view(1, 2, -1, 8) for x in (q, k, v))  # only the length is open
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask(q, k), **given)

    return forward


def qkv(n, m=None, heads=2):
    generator = torch.Generator().manual_seed(n)
    sizes = (n, m or n, m or n)
    return [torch.randn(1, heads, size, 8, generator=generator) for size in sizes]


def below(q, k, shift=0):
    rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    return columns[None] <= rows[:, None] + shift


CAUSAL = {
    "bool": below,
    "4 dims": lambda q, k: below(q, k)[None, None].expand(1, 2, -1, -1),
    "lt": lambda q, k: torch.arange(k.shape[2])[None] < torch.arange(q.shape[2])[:, None] + 1,
    "tril": lambda q, k: torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(),
    "-inf": lambda q, k: torch.zeros(q.shape[2], k.shape[2]).masked_fill(
        ~below(q, k), float("-inf")
    ),
    "and all": lambda q, k: below(q, k) & (torch.arange(k.shape[2]) >= 0),
}


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_becomes_a_flag(name):
    block = Call(attend(lambda q, k: CAUSAL[name](q, q)))
    found = simplified(block, *qkv(5))
    (call,) = attention(found)
    assert call.get("attn_mask") is None
    assert call["is_causal"] is True
    assert not squares(found)
    for n in LENGTHS:
        assert torch.equal(run(found, block, qkv(n)), block(*qkv(n)))


OTHER = {
    "without the diagonal": lambda q, k: below(q, k, -1) | (torch.arange(k.shape[2]) == 0),
    "one more": lambda q, k: below(q, k, 1),
    "the other way": lambda q, k: below(q, k).T,
    "a window": lambda q, k: below(q, k) & ~below(q, k, -3),
    "large instead of infinite": lambda q, k: torch.where(below(q, k), 0.0, -1e4),
    "biased": lambda q, k: torch.where(below(q, k), 1.0, float("-inf")),
    "true at 5, not at 19": lambda q, k: (torch.arange(k.shape[2]) < 9)[None, None, None],
    "given": lambda q, k: q[:, :1, :, :1] > -9,
}


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_stay(name):
    block = Call(attend(lambda q, k: OTHER[name](q, q)))
    found = simplified(block, *qkv(5))
    (call,) = attention(found)
    assert call["attn_mask"] is not None
    assert not call.get("is_causal")
    for n in LENGTHS:
        torch.testing.assert_close(run(found, block, qkv(n)), block(*qkv(n)), rtol=0, atol=0)


def test_a_causal_mask_of_other_lengths_stays():
    block = Call(attend(below))
    found = simplified(block, *qkv(5, 7))
    (call,) = attention(found)
    assert call["attn_mask"] is not None
    for n in LENGTHS:
        assert torch.equal(run(found, block, qkv(n, n + 2)), block(*qkv(n, n + 2)))


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_mask_of_everything_is_dropped(dtype):
    def everything(q, k):
        mask = torch.arange(k.shape[2])[None] + torch.arange(q.shape[2])[:, None] >= 0
        return mask if dtype == torch.bool else torch.where(mask, 0.0, float("-inf"))

    block = Call(attend(everything))
    found = simplified(block, *qkv(5))
    (call,) = attention(found)
    assert call.get("attn_mask") is None
    assert not call.get("is_causal")
    assert torch.equal(run(found, block, qkv(19)), block(*qkv(19)))


def test_a_mask_of_keys_is_not_written_out_for_each_query():
    def forward(q, k, v, keep):
        q, k, v = (x.view(1, 2, -1, 8) for x in (q, k, v))
        mask = keep[:, None, None].expand(1, 1, q.shape[2], -1)
        everything = torch.arange(q.shape[2])[:, None] >= 0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask & everything)

    def inputs(n):
        return [*qkv(n), torch.arange(n)[None] % 3 != 1]

    block = Call(forward)
    found = simplified(block, *inputs(200))
    after = measure(fx.GraphModule(nn.Module(), found.graph), inputs(200))
    assert not squares(found)
    assert after.peak_bytes < 200 * 200 * 4  # what the mask alone takes as numbers
    for n in LENGTHS:
        assert torch.equal(run(found, block, inputs(n)), block(*inputs(n)))


def test_keys_are_not_repeated_for_their_queries():
    def forward(q, k, v):
        k, v = (x[:, :, None].expand(1, 2, 3, -1, 8).reshape(1, 6, -1, 8) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def inputs(n):
        return [qkv(n, heads=6)[0], *qkv(n)[1:]]

    block = Call(forward)
    found = simplified(block, *inputs(5))
    (call,) = attention(found)
    assert call["enable_gqa"] is True
    assert "aten.clone" not in names(found)
    for n in LENGTHS:
        assert torch.equal(run(found, block, inputs(n)), block(*inputs(n)))


# ------------------------------------------------------------------------------------- arithmetic

SAME = {
    "where": lambda x: torch.where(torch.arange(x.shape[1]) >= 0, x.exp(), 0.0),
    "where not": lambda x: torch.where(torch.arange(x.shape[1]) < 0, 0.0, x.exp()),
    "add": lambda x: x.exp() + torch.zeros(x.shape[1]),
    "add from the left": lambda x: torch.zeros(x.shape[1]) + x.exp(),
    "sub": lambda x: x.exp() - torch.zeros(()),
    "mul": lambda x: x.exp() * 1.0,
    "div": lambda x: x.exp() / torch.ones(()),
    "fill": lambda x: x.exp().masked_fill(torch.arange(x.shape[1]) < 0, 3.0),
    "and": lambda x: (x.exp() > 1) & torch.ones((), dtype=torch.bool),
    "or": lambda x: (x.exp() > 1) | torch.zeros((), dtype=torch.bool),
    "slice": lambda x: x.exp()[:, 0:],
}


@pytest.mark.parametrize("name", SAME)
def test_what_does_nothing_is_dropped(name):
    block = Call(lambda x: SAME[name](x) * 2)
    found = simplified(block, torch.randn(3, 5))
    assert set(names(found)) <= {"aten.exp", "aten.mul", "aten.gt"}
    for n in LENGTHS:
        x = torch.randn(3, n)
        assert torch.equal(run(found, block, [x]), block(x))


DIFFERENT = {
    "0 - x": lambda x: torch.zeros(()) - x,
    "1 / x": lambda x: torch.ones(()) / x,
    "floor": lambda x: torch.div(x, 1, rounding_mode="floor"),
    "two times": lambda x: torch.add(torch.zeros(()), x, alpha=2),
    "1 & x": lambda x: torch.ones((), dtype=torch.long) & (x * 100).long(),
    "to float64": lambda x: x + torch.zeros(1, dtype=torch.float64),
    "wider": lambda x: x + torch.zeros(4, 1, 1),
    "transposed": lambda x: x.T.contiguous().view(-1),
    "true at 5, not at 19": lambda x: torch.where(torch.arange(x.shape[1]) < 9, x, 0.0),
    "false at 5, not at 19": lambda x: x.masked_fill(torch.arange(x.shape[1]) > 9, 1.0),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_what_does_something_stays(name):
    block = Call(lambda x: DIFFERENT[name](x.exp()))
    found = simplified(block, torch.randn(3, 5))
    for n in LENGTHS:
        x = torch.randn(3, n)
        got, expected = run(found, block, [x]), block(x)
        assert got.dtype == expected.dtype
        assert got.stride() == expected.stride()
        assert torch.equal(got, expected)


def test_a_product_added_to_nothing_takes_no_memory_for_it():
    def forward(a, b):
        n, m = a.shape[1], b.shape[2]
        return torch.baddbmm(torch.empty(2, n, m), a, b, beta=0, alpha=0.5).softmax(-1)

    def inputs(n):
        return [torch.randn(2, n, 4), torch.randn(2, 4, n)]

    block = Call(forward)
    found = simplified(block, *inputs(50))
    after = measure(fx.GraphModule(nn.Module(), found.graph), inputs(50))
    assert after.peak_bytes <= 2 * (2 * 50 * 50 * 4) + 64
    for n in LENGTHS:
        x = inputs(n)
        assert torch.equal(run(found, block, x), (0.5 * x[0] @ x[1]).softmax(-1))


# -------------------------------------------------------------------------------- copies, aliases


def test_a_copy_that_nobody_sees_is_dropped():
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.ReLU(), nn.Dropout(), nn.Linear(4, 4))
    found = simplified(block, torch.randn(3, 4))
    assert "aten.clone" not in names(found)
    assert torch.equal(run(found, block, [torch.ones(7, 4)]), block(torch.ones(7, 4)))


def test_outputs_alias_what_they_did():
    def forward(x):
        y = x.exp()
        return x.clone(), y, y.clone(), y.view(-1), (y + 1).clone()

    block = Call(forward)
    x = torch.randn(3, 5)
    found = simplified(block, x)
    outputs = run(found, block, [x])
    owners = [t.untyped_storage().data_ptr() for t in (x, *outputs)]
    assert len(set(owners)) == 5
    assert owners[2] == owners[4]  # y and its view
    assert names(found).count("aten.clone") == 2
    for got, expected in zip(outputs, block(x), strict=True):
        assert torch.equal(got, expected)


def test_a_graph_that_writes_in_place_is_left_alone():
    found = traced(lambda x: (x + 1) * 2, torch.randn(3))
    total = next(node for node in found.graph.nodes if node.target is aten.add.Tensor)
    with found.graph.inserting_after(total):
        clone = found.graph.call_function(aten.clone.default, (total,))
    with found.graph.inserting_after(clone):
        write = found.graph.call_function(aten.add_.Tensor, (clone, 1))
    clone.meta["val"] = write.meta["val"] = total.meta["val"]
    before = str(found.graph)
    simplify(found.graph)
    assert str(found.graph) == before


def test_an_empty_graph_is_left_alone():
    graph = fx.Graph()
    graph.output(())
    simplify(graph)
    assert len(graph.nodes) == 1


# ------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("ignored", [-100, 2])
@pytest.mark.parametrize("name", ["cross_entropy", "nll_loss"])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
def test_a_loss_is_the_same_in_parts(reduction, ignored, name, dtype, close):
    block = Call(lambda x, y: getattr(F, name)(x, y, reduction=reduction, ignore_index=ignored))
    example = torch.randn(5, 7, dtype=dtype), torch.arange(5)
    found = simplified(block, *example)
    assert not {f"aten.{name}", "aten.cross_entropy_loss", "aten.nll_loss_nd"} & set(names(found))
    for n in LENGTHS:
        x = (3 * torch.randn(n, 7, dtype=dtype)).log_softmax(1)  # so that no terms cancel
        for y in (torch.randint(7, (n,)), torch.full((n,), ignored), torch.arange(n) % 3):
            if ignored < 0:
                y[0] = ignored
            expected = block(x, y)
            torch.testing.assert_close(
                run(found, block, [x, y]), expected, rtol=close, atol=0, equal_nan=True
            )


def test_a_loss_of_half_precision_counts_exactly():
    block = Call(F.cross_entropy)
    x, y = torch.randn(2053, 7).bfloat16(), torch.arange(2053) % 7
    found = simplified(block, x[:5], y[:5])
    assert "aten.cross_entropy_loss" not in names(found)
    got, expected = run(found, block, [x, y]), block(x, y)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, block(x.float(), y).bfloat16(), rtol=2**-7, atol=0)


LOSSES = {
    "weighted": lambda x, y: F.cross_entropy(x, y, weight=torch.ones(7)),
    "smoothed": lambda x, y: F.cross_entropy(x, y, label_smoothing=0.1),
    "soft": lambda x, y: F.cross_entropy(x, F.one_hot(y, 7).float()),
    "of pictures": lambda x, y: F.cross_entropy(x.T[None], y[None]),
}


@pytest.mark.parametrize("name", LOSSES)
def test_other_losses_stay(name):
    block = Call(LOSSES[name])
    found = simplified(block, torch.randn(5, 7), torch.arange(5))
    assert "aten.cross_entropy_loss" in names(found)
    x, y = torch.randn(19, 7), torch.arange(19) % 7
    assert torch.equal(run(found, block, [x, y]), block(x, y))


def test_gradients_of_a_loss_in_parts():
    block = Call(F.cross_entropy)
    found = simplified(block, torch.randn(5, 7), torch.arange(5))
    x = torch.randn(19, 7, dtype=torch.float32)
    y = torch.where(torch.arange(19) % 4 == 0, -100, torch.arange(19) % 7)
    grads = []
    for call in (fx.GraphModule(nn.Module(), found.graph), lambda *a: (block(*a),)):
        leaf = x.clone().requires_grad_()
        call(leaf, y)[0].backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-8)


# ----------------------------------------------------------------------------------------- models


def model_graph(title, kwargs=None):
    case = zoo.select(title)[0]
    model = case.build()
    args, given = case.inputs(case.tiny_length)
    given = {**given, **(kwargs or {})}
    found = trace(model, args, given)
    env = next(
        n.meta["val"].fake_mode.shape_env for n in found.placeholders if n.meta["val"] is not None
    )
    guards = len(env.guards)
    simplify(found.graph)
    found.graph.lint()
    assert len(env.guards) == guards
    return case, model, found


def tensors(result):
    leaves = torch.utils._pytree.tree_leaves(
        result.to_tuple() if hasattr(result, "to_tuple") else result
    )
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def assert_equal_elsewhere(case, model, found, change=dict, rtol=0.0):
    for n in (case.tiny_length + 1, case.tiny_length + 5):
        args, kwargs = case.inputs(n)
        kwargs = change(kwargs)
        call = fx.GraphModule(nn.Module(), found.graph)
        with torch.no_grad():
            got = tensors(call(*found.flat_inputs(model, model.forward, args, kwargs)))
            expected = tensors(model(*args, **kwargs))
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=0)


def assert_values_are_right(found):
    """Run all operations again: shapes, strides and who shares whose storage."""
    fresh = {n: n.meta["val"] for n in found.placeholders}
    for node in found.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: fresh[n])
            mode = next(
                v.fake_mode for v in fresh.values() if isinstance(v, Tensor) and v is not None
            )
            fresh[node] = node.meta["val"]
            if "upsample" not in str(node.target):  # which takes no symbols
                with torch.no_grad(), mode:
                    fresh[node] = node.target(*args, **kwargs)
    owners: dict[int, int] = {}
    for node, value in fresh.items():
        for old, new in zip(tensors(node.meta["val"]), tensors(value), strict=True):
            assert [str(n) for n in old.shape] == [str(n) for n in new.shape], node
            assert [str(n) for n in old.stride()] == [str(n) for n in new.stride()], node
            assert old.dtype == new.dtype
            one, other = (t.untyped_storage()._cdata for t in (old, new))
            assert owners.setdefault(one, other) == other, f"{node} shares with another"


@needs_transformers
@pytest.mark.parametrize("title", [slow("GPT-2 (sdpa)"), "Llama and loss (sdpa)"])
def test_language_models_attend_causally_without_a_mask(title):
    case, model, found = model_graph(title)
    calls = attention(found)
    assert len(calls) == 2
    assert all(call["is_causal"] and call.get("attn_mask") is None for call in calls)
    assert not squares(found)
    assert not {"aten.where", "aten.eq", "aten.le", "aten.index"} & set(names(found)) - {
        "aten.where"  # of the loss
    }
    assert_equal_elsewhere(case, model, found, rtol=1e-6)
    assert_values_are_right(found)


@needs_transformers
@pytest.mark.parametrize("title", ["HF ViT (sdpa)", slow("HF ViT (eager)")])
def test_vision_transformers_have_no_mask(title):
    case, model, found = model_graph(title)
    assert all(call.get("attn_mask") is None for call in attention(found))
    assert not {"aten.where", "aten.ge", "aten.clone"} & set(names(found)) - (
        {"aten.clone"} if "eager" in title else set()
    )
    assert_equal_elsewhere(case, model, found)
    assert_values_are_right(found)


@needs_transformers
@pytest.mark.parametrize("variant", ["sdpa", "eager"])
def test_a_mask_given_as_data_stays(variant):
    """ESM-2 with ``attention_mask``: needed where it is not all ones; a line, not a square."""
    case, model, found = model_graph(f"ESM-2 ({variant})")
    if variant == "sdpa":
        assert all(call["attn_mask"] is not None for call in attention(found))
        assert not squares(found)
    else:
        assert "aten.where" in names(found)

    def some(kwargs):
        mask = kwargs["attention_mask"].clone()
        mask[:, 20:] = 0
        return {**kwargs, "attention_mask": mask}

    assert_equal_elsewhere(case, model, found)
    assert_equal_elsewhere(case, model, found, change=some, rtol=1e-5)
    assert_values_are_right(found)


@needs_transformers
@pytest.mark.parametrize("variant", ["sdpa", slow("eager")])
def test_without_a_given_mask_none_is_left(variant):
    case, model, found = model_graph(f"ESM-2 ({variant})", {"attention_mask": None})
    assert all(call.get("attn_mask") is None for call in attention(found))
    assert "aten.where" not in names(found)
    assert_equal_elsewhere(
        case, model, found, change=lambda kwargs: {**kwargs, "attention_mask": None}
    )


@needs_transformers
@pytest.mark.parametrize("title", ["GPT-2 (eager)", slow("Llama and loss (eager)")])
def test_eager_attention_keeps_its_causal_mask(title):
    case, model, found = model_graph(title)
    masks = [node for node in found.graph.nodes if node.target is aten.where.ScalarOther]
    assert any(isinstance(m.meta["val"].shape[-1], torch.SymInt) for m in masks)
    assert_equal_elsewhere(case, model, found, rtol=1e-6)
    assert_values_are_right(found)
