"""Layouts: what a pattern says, which patterns are refused, and how sizes follow from shapes."""

import copy
import pickle

import numpy as np
import pytest

from hairpin.comm.mesh import Mesh
from hairpin.errors import HairpinError, LayoutError, MeshError
from hairpin.layout import (
    Layout,
    Pattern,
    shard_offset,
    shard_size,
    shard_sizes,
    solve_sizes,
)

B, T, S, C = 2, 7, 5, 3


def sized(pattern: str) -> Layout:
    return Layout.of(pattern, {"b": B, "t": T, "s": S, "c": C})


# Patterns


@pytest.mark.parametrize(
    ("text", "groups", "splits", "bracketed"),
    [
        ("b t s c", (("b",), ("t",), ("s",), ("c",)), {}, ()),
        ("b t/sp s c", (("b",), ("t",), ("s",), ("c",)), {"t": "sp"}, ()),
        ("(b s/sp) t c", (("b", "s"), ("t",), ("c",)), {"s": "sp"}, ()),
        ("(b/dp s/sp) t", (("b", "s"), ("t",)), {"b": "dp", "s": "sp"}, ()),
        ("(b t/sp) [s] c", (("b", "t"), ("s",), ("c",)), {"t": "sp"}, ("s",)),
        ("[t]/sp s", (("t",), ("s",)), {"t": "sp"}, ("t",)),
        ("b ([t] [s]) c", (("b",), ("t", "s"), ("c",)), {}, ("t", "s")),
        ("b 1 c", (("b",), (), ("c",)), {}, ()),
        ("b () c", (("b",), (), ("c",)), {}, ()),
        ("1", ((),), {}, ()),
        ("", (), {}, ()),
        ("x_1 X1/Sp_2 _y", (("x_1",), ("X1",), ("_y",)), {"X1": "Sp_2"}, ()),
    ],
)
def test_a_pattern_says(text, groups, splits, bracketed):
    pattern = Pattern.parse(text)
    assert pattern.groups == groups
    assert dict(pattern.splits) == splits
    assert pattern.bracketed == bracketed
    assert pattern.dims == tuple(dim for group in groups for dim in group)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("b t b", "dim 'b' is used twice"),
        ("b (t b)", "dim 'b' is used twice"),
        ("t/sp s/sp", "mesh axis 'sp' is used twice"),
        ("(t/sp s/sp) c", "mesh axis 'sp' is used twice"),
        ("((b t) s)", "parentheses may not nest"),
        ("b t) s", r"'\)' without '\('"),
        ("(b t s", r"'\(' without '\)'"),
        ("b t- s", "'t-' is not a dim"),
        ("b, t", "'b,' is not a dim"),
        ("b t/ s", "'t/' is not a dim"),
        ("b /sp", "'/sp' is not a dim"),
        ("b [t s", "is not a dim"),
        ("b t] s", "is not a dim"),
        ("b [t/sp] s", "is not a dim"),
        ("b 2 c", "'2' is not a dim"),
        ("b (1 c)", "'1' is not a dim"),
        ("b ... c", r"'\.\.\.' is not a dim"),
    ],
)
def test_a_wrong_pattern_is_refused(text, words):
    with pytest.raises(LayoutError, match=words) as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)  # names the pattern
    assert isinstance(caught.value, HairpinError)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("text", ["b 11 c", "b 1s c", "b 10 c", "s/sp/dp c", "b 1/sp"])
def test_words_are_not_cut_into_pieces(text):
    with pytest.raises(LayoutError, match="is not a dim"):
        Pattern.parse(text)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("b t/sp s", "b t/sp s"),
        ("b t/sp s", "  b   t/sp\ts "),
        ("b t/sp s", "(b) (t/sp) s"),
        ("b t/sp s", "(b)(t/sp)s"),
        ("(b t/sp) s", "( b t/sp )s"),
        ("b 1 s", "b () s"),
        ("b [t] s", "b ([t]) s"),
    ],
)
def test_equivalent_patterns_are_equal(one, other):
    assert Pattern.parse(one) == Pattern.parse(other)
    assert hash(Pattern.parse(one)) == hash(Pattern.parse(other))
    assert sized(one) == sized(other)
    assert hash(sized(one)) == hash(sized(other))
    assert len({sized(one), sized(other)}) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("b t s", "t b s"),
        ("b t s", "b (t s)"),
        ("b t s", "b t/sp s"),
        ("b t/dp s", "b t/sp s"),
        ("b t/sp s", "b t s/sp"),
        ("b t s", "b t 1 s"),
    ],
)
def test_other_patterns_are_not_equal(one, other):
    assert Pattern.parse(one) != Pattern.parse(other)
    assert sized(one) != sized(other)


@pytest.mark.parametrize("text", ["b t/sp s c", "(b/dp s/sp) t", "b 1 (t s/sp)", "1", ""])
def test_a_pattern_renders_as_it_was_read(text):
    assert Pattern.parse(text).render() == text
    assert Pattern.parse(Pattern.parse(text).render()) == Pattern.parse(text)


# Layouts


def test_a_layout_has_sizes_and_shapes():
    layout = Layout("(b s/sp) t/dp 1 c", b=2, s=6, t=5, c=3)
    assert layout.global_shape == (12, 5, 1, 3)
    assert layout.dims == ("b", "s", "t", "c") == tuple(layout)
    assert layout.axes == ("sp", "dp")
    assert (layout.split_dim("sp"), layout.split_dim("dp"), layout.split_dim("tp")) == (
        "s",
        "t",
        None,
    )
    assert layout.position("t") == 2
    assert str(layout) == "'(b s/sp) t/dp 1 c' (b=2, s=6, t=5, c=3)"
    assert Layout("").global_shape == ()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Layout("b t", b=2), "no size for dim 't'; give it as a keyword, t="),
        (lambda: Layout("b t", b=2, t=3, s=4), "has no dim 's'; its dims are b, t"),
        (lambda: Layout("", s=4), "has no dim 's'; its dims are none"),
        (lambda: Layout("b t", b=2, t=-1), "dim 't' has size -1; a size is a whole number"),
        (lambda: Layout("b t", b=2, t=2.0), "dim 't' has size 2.0; a size is a whole number"),
        (lambda: Layout("b t", b=2, t="3"), "dim 't' has size '3'; a size is a whole number"),
        (lambda: Layout.of("b t", {"b": 2}), "no size for dim 't'"),
        (lambda: sized("b t s").split("r", "sp"), "has no dim 'r'; its dims are b, t, s"),
        (lambda: sized("b t s").position("r"), "has no dim 'r'; its dims are b, t, s"),
        (
            lambda: sized("b t/dp s").split("t", "sp"),
            "dim 't' is already split over axis 'dp'; split it over one axis only",
        ),
    ],
)
def test_a_wrong_layout_is_refused(make, words):
    with pytest.raises(LayoutError, match=words):
        make()


def test_of_takes_only_the_sizes_it_needs():
    assert Layout.of("b t", {"b": 2, "t": 3, "s": 4}) == Layout("b t", b=2, t=3)


def test_a_layout_does_not_change():
    layout = sized("b t/sp s")
    with pytest.raises(AttributeError):
        layout.pattern = Pattern.parse("b t s")
    with pytest.raises(TypeError):
        layout.sizes["b"] = 9
    with pytest.raises(TypeError):
        layout.pattern.splits["s"] = "dp"


def test_other_sizes_are_another_layout():
    assert Layout("b t", b=2, t=3) != Layout("b t", b=3, t=2)
    assert len({Layout("b t", b=2, t=3), Layout("b t", b=3, t=2)}) == 2


@pytest.mark.parametrize("pattern", ["b t/sp s c", "(b s/sp) t/dp c", "b [t]/sp ([s] c)", "1 t"])
def test_layouts_travel(pattern):
    layout = sized(pattern)
    pickled = pickle.loads(pickle.dumps(layout))  # noqa: S301  # our own
    for other in (pickled, copy.deepcopy(layout), copy.copy(layout)):
        assert other == layout
        assert hash(other) == hash(layout)
        assert other.pattern.bracketed == layout.pattern.bracketed
        assert str(other) == str(layout)


def test_split_and_unsplit():
    whole = sized("(b s) t c")
    split = whole.split("s", "sp")
    assert split == sized("(b s/sp) t c")
    assert split.split("t", "sp") == sized("(b s) t/sp c")  # the axis leaves s for t
    assert split.split("t", "dp") == sized("(b s/sp) t/dp c")
    assert split.split(None, "sp") == whole
    assert split.split("s", "sp") == split
    assert whole.split(None, "sp") == whole
    assert whole == sized("(b s) t c")  # unchanged


def test_split_keeps_brackets():
    layout = sized("b [t]/sp s")
    assert layout.split(None, "sp") == sized("b [t] s")
    assert layout.split("s", "sp") == sized("b [t] s/sp")


# Shards


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("length", [0, 1, 2, 3, 5, 7, 8, 9, 13, 64, 65, 101])
def test_shards_are_balanced(length, parts):
    sizes = shard_sizes(length, parts)
    assert sizes == [len(part) for part in np.array_split(np.arange(length), parts)]
    assert sizes == [shard_size(length, parts, index) for index in range(parts)]
    assert sum(sizes) == length
    assert sizes == sorted(sizes, reverse=True)
    assert sum(size == length // parts + 1 for size in sizes) == length % parts
    offsets = [shard_offset(length, parts, index) for index in range(parts)]
    assert offsets == [sum(sizes[:index]) for index in range(parts)]


@pytest.mark.parametrize("place", range(4))
def test_local_shapes(place):
    at = {"sp": (place, 4), "dp": (1, 2)}
    assert sized("b t/sp s c").local_shape_at(at) == (B, [2, 2, 2, 1][place], S, C)
    assert sized("b s/sp c").local_shape_at(at) == (B, [2, 1, 1, 1][place], C)
    assert sized("c/sp b").local_shape_at(at) == ([1, 1, 1, 0][place], B)
    assert sized("(b/dp s/sp) t").local_shape_at(at) == ([2, 1, 1, 1][place], T)
    assert sized("b t/sp").local_sizes(at) == {"b": B, "t": [2, 2, 2, 1][place]}
    assert Layout("n/sp m", n=0, m=3).local_shape_at(at) == (0, 3)


def test_local_shape_on_a_mesh():
    layout = sized("b t/sp s")
    assert layout.local_shape(Mesh(sp=1)) == layout.global_shape
    assert layout.local_shape(Mesh(dp=2, sp=4)) == (B, 2, S)  # a description stands at rank 0
    with pytest.raises(MeshError, match="has no axis 'sp'"):
        layout.local_shape(Mesh(dp=2))


# Sizes from shapes


def solve(known=None, **tensors):
    shapes = {name: (Pattern.parse(text), shape) for name, (text, shape) in tensors.items()}
    return solve_sizes(shapes, known or {})


@pytest.mark.parametrize(
    ("tensors", "known", "sizes"),
    [
        ({"x": ("b t s", (2, 3, 4))}, {}, {"b": 2, "t": 3, "s": 4}),
        ({"x": ("(b t) s", (6, 4))}, {"b": 2}, {"b": 2, "t": 3, "s": 4}),
        # the second tensor tells what the first leaves open
        ({"x": ("(b t) s", (6, 4)), "y": ("b 1", (2, 1))}, {}, {"b": 2, "t": 3, "s": 4}),
        (
            {"x": ("(a b c)", (30,)), "y": ("(a b)", (6,)), "z": ("a", (2,))},
            {},
            {"a": 2, "b": 3, "c": 5},
        ),
        ({"x": ("(b t)", (0,))}, {"b": 3}, {"b": 3, "t": 0}),
        ({"x": ("", ())}, {"q": 9}, {"q": 9}),
        ({"x": ("1 () t", (1, 1, 5))}, {}, {"t": 5}),
        ({"x": ("[t]/sp c", (5, 1))}, {}, {"t": 5, "c": 1}),
    ],
)
def test_sizes_follow_from_shapes(tensors, known, sizes):
    before = dict(known)
    assert solve(known, **tensors) == sizes
    assert known == before


@pytest.mark.parametrize(
    ("tensors", "known", "words"),
    [
        ({"x": ("b t", (2, 3, 4))}, {}, r"x has shape \(2, 3, 4\), 3 dims, but .* 'b t' has 2"),
        ({"x": ("b t", (2, 3))}, {"t": 4}, "'b t': a dim of length 3 cannot be t with t=4"),
        ({"x": ("b t", (2, 3)), "y": ("t b", (2, 2))}, {}, "y, .* length 2 cannot be t with t=3"),
        ({"x": ("(b t) s", (7, 4))}, {"b": 2}, "length 7 cannot be b x t with b=2"),
        ({"x": ("(b t)", (7,))}, {"b": 2, "t": 3}, "length 7 cannot be b x t with b=2, t=3"),
        ({"x": ("(b t)", (7,))}, {"b": 0}, "length 7 cannot be b x t with b=0"),
        ({"x": ("b 1", (2, 3))}, {}, "length 3 cannot be 1"),
        ({"x": ("(b t) s", (6, 4))}, {}, "do not say how 6 divides into b x t; give sizes={'b'"),
        ({"x": ("(b t)", (0,))}, {"b": 0}, "do not say how 0 divides into b x t; .*{'t'"),
    ],
)
def test_contradictions_are_named(tensors, known, words):
    with pytest.raises(LayoutError, match=words):
        solve(known, **tensors)
