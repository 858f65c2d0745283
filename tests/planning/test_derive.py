"""Tables derived from a run on shapes: as good as those written by hand, or refused by reason."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import hairpin as hp
from hairpin.errors import PlanError
from hairpin.layout import Pattern
from hairpin.models import axial3d, video_dit
from hairpin.models.axial3d.seams import ATTENDS as AXIAL3D
from hairpin.models.third_party.latte import ATTENDS as LATTE
from hairpin.models.third_party.msa_transformer import ATTENDS as MSA
from hairpin.models.video_dit.seams import ATTENDS as VIDEO_DIT
from hairpin.planning.split.derive import derive_attends
from hairpin.planning.split.seam import match_table
from planning.test_models import HALVED, MODELS
from planning.toys import axial_case, video_case
from planning.truth import Arguments, Case, check, randomised, seeded


@dataclass(frozen=True)
class Known:
    """A model with a table written by hand.

    Attributes:
        lines: some lines of the table that must come out.
    """

    build: Callable[[], nn.Module]
    arguments: Callable[..., Arguments]
    hand: Mapping[str, Any]
    lines: Mapping[str, str]


def _latte() -> Known:
    pytest.importorskip("diffusers", reason="diffusers is not installed (pip install hairpin[hf])")
    from third_party import test_latte

    lines = {
        "transformer_blocks.*": "(b t) [s] c",
        "temporal_transformer_blocks.*": "(b s) [t] c",
        "proj_out": "(b t) s c",
    }
    return Known(
        lambda: test_latte.build(16), lambda b=2: test_latte.arguments(16, b), LATTE, lines
    )


def _msa(padded: bool = False) -> Known:
    pytest.importorskip("esm", reason="fair-esm is not installed (pip install hairpin[hf])")
    from third_party import test_msa_transformer

    lines = {
        "layers.*.row_self_attention": "[t] [s] b c",
        "layers.*.column_self_attention": "[t] s b c",
        "layers.*.feed_forward_layer": "t s b c",
        "lm_head": "b t s c",
    }
    return Known(
        test_msa_transformer.build,
        lambda b=2: test_msa_transformer.tokens(b, 5, 8, padded=padded),
        MSA,
        lines,
    )


def _video_dit() -> Known:
    def arguments(b: int = 2) -> Arguments:
        given = torch.zeros(b, 6, dtype=torch.bool)
        given[:, :2] = True
        labels = torch.ones(b, 1, dtype=torch.long)
        return (seeded((b, 6, 8, 16)), seeded((b,)).abs(), labels, given), {}

    lines = {
        "blocks.*.spatial": "b t [s] c",
        "blocks.*.temporal": "b [t] s c",
        "head": "b t s c",
    }
    model = video_dit.model
    return Known(lambda: randomised(model.VideoDiT(model.tiny())), arguments, VIDEO_DIT, lines)


def _axial3d() -> Known:
    def arguments(b: int = 2) -> Arguments:
        return (seeded((b, 4, 6, 5, 2)),), {}

    lines = {
        "blocks.*.level": "b [t] h w c",
        "blocks.*.latitude": "b t [h] w c",
        "blocks.*.longitude": "b t h [w] c",
        "head": "b t h w c",
    }
    model = axial3d.model
    return Known(
        lambda: randomised(model.Axial3D(model.tiny((4, 6, 5)))), arguments, AXIAL3D, lines
    )


KNOWN = {
    "latte": _latte,
    "msa": _msa,
    "msa, padded": lambda: _msa(padded=True),
    "video_dit": _video_dit,
    "axial3d": _axial3d,
}


@functools.cache
def derived(name: str) -> tuple[Known, Mapping[str, Any]]:
    """A known model and its derived table."""
    known = KNOWN[name]()
    return known, derive_attends(known.build(), known.arguments(), ranks=4)


def streams(table: Mapping[str, Any]) -> dict[str, str]:
    """Each line's stream."""
    return {k: v.stream for k, v in table.items() if isinstance(v, hp.Seam)}


def bracketed_places(model: nn.Module, table: Mapping[str, Any]) -> dict[str, list[int]]:
    """Module -> places of its stream's dims that it computes along, whatever their names."""
    found = {}
    for path, seam in match_table(model, table).seams.items():
        pattern = Pattern.parse(seam.stream)
        found[path] = [pattern.dims.index(dim) for dim in pattern.bracketed]
    return found


def held_places(plan: hp.Plan) -> dict[str, int | None]:
    """Module -> place of the dim that its stream holds split."""
    return {
        stage.module: None
        if stage.held is None
        else Pattern.parse(stage.seam.stream).dims.index(stage.held)
        for stage in plan.stages
    }


@pytest.mark.parametrize("name", KNOWN)
def test_a_known_model_comes_out_as_its_table_says(name):
    known, table = derived(name)
    model = known.build()
    assert streams(table) == known.lines

    ours, hand = bracketed_places(model, table), bracketed_places(model, known.hand)
    stages = hand.keys() - {"emb_layer_norm_after"}  # a norm may run anywhere: no line needed
    assert {path: ours[path] for path in stages} == {path: hand[path] for path in stages}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", KNOWN)
def test_its_plan_sends_no_more_and_holds_the_same(name, ranks):
    known, table = derived(name)
    model, example, mesh = known.build(), known.arguments(), hp.Mesh(sp=ranks)
    ours = hp.plan(model, example, mesh, attends=table)
    hand = hp.plan(model, example, mesh, attends=known.hand)
    assert sum(ours.sent_bytes_by_rank) <= sum(hand.sent_bytes_by_rank)
    held, wanted = held_places(ours), held_places(hand)
    assert {path: held[path] for path in held if path in wanted} == {
        path: wanted[path] for path in held if path in wanted
    }


@pytest.mark.parametrize("name", ["latte", "msa"])
def test_a_batch_of_one_gives_the_same_table(name):
    known, table = derived(name)
    assert derive_attends(known.build(), known.arguments(1), ranks=4) == table


def test_values_and_gradients_equal_one_process():
    cases = []
    for name in KNOWN:
        known, table = derived(name)
        cases.append(Case(name, known.build, known.arguments, table))
    check(tuple(cases), 3)


TOYS = (
    *MODELS,
    *HALVED,
    video_case("video"),
    video_case("video with dropout", drop=0.2),
    video_case("blocks run twice", repeats=2),
    axial_case(3, 1, (4, 5, 6)),
)


@pytest.mark.parametrize("case", TOYS, ids=lambda case: case.name)
def test_a_toy_is_split_as_cheaply_as_by_hand(case):
    model, example = case.build(), case.arguments()
    table = derive_attends(model, example, ranks=3)
    ours, hand = (
        hp.plan(model, example, hp.Mesh(sp=3), attends=attends) for attends in (table, case.attends)
    )
    assert sum(ours.sent_bytes_by_rank) <= sum(hand.sent_bytes_by_rank)


# ------------------------------------------------------------------------------------ other models


class Attention(nn.Module):
    """Along dim 1 of x[b, s, c]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)

    def forward(self, x):
        b, s, c = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, s, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, s, c))


def mlp() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))


class TextBlock(nn.Module):
    """Pre-norm residuals outside of attention and MLP, as in GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = mlp()

    def forward(self, x):
        x = x + self.attention(x)
        return x + self.mlp(x)


class Text(nn.Module):
    """One long dim: the MLPs can be split along it, attention not."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.positions = nn.Parameter(torch.randn(7, 8))
        self.blocks = nn.ModuleList(TextBlock() for _ in range(depth))

    def forward(self, tokens):
        x = self.embed(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return x @ self.embed.weight.t()


def text_arguments() -> Arguments:
    return (torch.arange(14).view(2, 7) % 11,), {}


def test_attention_and_mlp_over_one_long_dim():
    model = randomised(Text())
    table = derive_attends(model, text_arguments())
    assert streams(table) == {"blocks.*.attention": "b [s] c", "blocks.*.mlp": "b s c"}
    case = Case("text", lambda: randomised(Text()), text_arguments, table)
    (plan,) = check((case,), 2)
    assert {stage.held for stage in plan.stages if "mlp" in stage.module} == {"s"}


class Dropping(TextBlock):
    """A dropout between the stages, before the residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        x = x + self.drop(self.attention(x))
        return x + self.mlp(x)


class Pairs(nn.Module):
    """A tensor z[b, i, j, c] over all pairs of residues, computed along j and then along i."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        temporal, spatial = video_case("").build().blocks[0].children()
        self.blocks = nn.ModuleList([temporal, spatial, temporal.__class__(*spatial.children())])

    def forward(self, x):
        z = self.left(x)[:, :, None] + self.right(x)[:, None]
        for block in self.blocks:
            z = block(z)
        return z


MORE = (
    Case(
        "a dropout between stages",
        lambda: randomised(nn.Sequential(Dropping(), Dropping())).eval(),
        lambda: ((seeded((2, 6, 8)),), {}),
        {},
    ),
    Case("pairs", lambda: randomised(Pairs()), lambda: ((seeded((2, 6, 4)),), {}), {}),
)


def test_dropouts_between_stages_and_both_dims_of_pairs():
    cases = [replace(case, attends=derive_attends(case.build(), case.arguments())) for case in MORE]
    dropping, pairs = (streams(case.attends) for case in cases)
    assert dropping["*.drop"] == "b s c"
    assert pairs == {
        "blocks.0": "b t [s] c",
        "blocks.1": "b [t] s c",
        "blocks.2": "b [t] s c",
    }
    check(tuple(cases), 2)


class Convolutional(nn.Module):
    """Convolutions along the width, then along the height, channels second."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(4, 4, (1, 3), padding=(0, 1))
        self.high = nn.Conv2d(4, 4, (3, 1), padding=(1, 0))

    def forward(self, x):
        return self.high(self.wide(x).relu())


def test_convolutions_along_one_dim_each():
    build = lambda: randomised(Convolutional())  # noqa: E731
    arguments = lambda: ((seeded((2, 4, 5, 6)),), {})  # noqa: E731
    table = derive_attends(build(), arguments())
    assert streams(table)["wide"] == "b c t [s]"
    assert streams(table)["high"] == "b c [t] s"
    check((Case("convolutions", build, arguments, table),), 2)


class HardCoded(nn.Module):
    """Position by position as far as shapes tell, but for a length written down as a number."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) / x.shape[1]

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = video_case("").build().blocks[0].children()
        self.scaled = self.Scaled()

    def forward(self, x):
        return self.second(self.scaled(self.first(x)))


def test_a_number_taken_from_a_length_is_found_by_rehearsing():
    build = lambda: randomised(HardCoded())  # noqa: E731
    arguments = lambda: ((seeded((2, 6, 5, 4)),), {})  # noqa: E731
    table = derive_attends(build(), arguments())
    assert streams(table)["scaled"] == "b [t] s c"
    check((Case("a number", build, arguments, table),), 2)


class Guessing(HardCoded):
    """A length left for torch to work out, which it cannot of an empty tensor."""

    class Scaled(HardCoded.Scaled):
        def forward(self, x):
            return self.linear(x).view(*x.shape[:3], 2, -1).flatten(3)


@pytest.mark.parametrize(
    ("ranks", "stream"), [(5, "b t s c"), (6, "b t [s] c"), (7, "b [t] [s] c")]
)
def test_a_rank_left_with_nothing_is_rehearsed_too(ranks, stream):
    table = derive_attends(randomised(Guessing()), seeded((2, 6, 5, 4)), ranks=ranks)
    assert streams(table)["scaled"] == stream


def test_the_model_is_left_as_it_was():
    known = KNOWN["msa, padded"]()  # reads values, so it runs for real
    model = known.build()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = derive_attends(model, known.arguments())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert derive_attends(model, known.arguments()) == table


def test_the_batch_may_be_free_too():
    known, table = derived("msa, padded")
    example = known.arguments(4)
    plan = hp.plan(known.build(), example, hp.Mesh(sp=2), attends=table, free_dims=("b",))
    assert {stage.held for stage in plan.stages if "attention" in stage.module} == {"b"}


class Carrying(nn.Module):
    """Positions of every frame added between two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = video_case("").build().blocks[0].children()
        self.positions = nn.Parameter(torch.randn(6, 1, 4))

    def forward(self, x):
        return self.second(self.first(x) + self.positions)


def test_a_parameter_along_a_dim_gets_its_line():
    table = derive_attends(randomised(Carrying()), seeded((2, 6, 5, 4)))
    assert table["positions"] == "t 1 c"


# --------------------------------------------------------------------------------------- refusals


class OneAttention(nn.Module):
    """Everything computes along the one long dim."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Reading(nn.Module):
    """Branches on a value."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x) if x.any() else x


class Failing(nn.Module):
    def forward(self, x):
        raise ValueError("wants four dims")


REFUSED = (
    (OneAttention, torch.zeros(2, 6, 8), r"'blocks\.\*' computes along s"),
    (lambda: nn.Sequential(nn.Linear(8, 8)), torch.zeros(2, 6, 8), "no module computes along any"),
    (OneAttention, torch.zeros(2, 0, 8), r"empty tensor of shape \(2, 0, 8\)"),
    (OneAttention, {"x": None}, "holds no tensor"),
    (OneAttention, 3, "example is a int"),
    (Failing, torch.zeros(2, 6, 8), "Failing failed on the example: ValueError: wants four dims"),
    (lambda: Reading().to("meta"), torch.zeros(2, 6, 4), "reads values of its input"),
)


@pytest.mark.parametrize(("build", "example", "message"), REFUSED)
def test_what_cannot_be_split_is_refused_with_the_reason(build, example, message):
    with pytest.raises(PlanError, match=message):
        derive_attends(build(), example)
