"""Models that mix positions outside their attention are refused on every rank, and no others."""

import copy
import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import hairpin as hp
from hairpin.bench.absent import placeholders
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.errors import SequenceError
from hairpin.run.launch import launch

WIDTH, LENGTH = 8, 90


def line() -> Mesh:
    return init_mesh(sp=int(os.environ["WORLD_SIZE"]), timeout_s=60)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, beside):
        super().__init__()
        self.attn, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.beside = beside
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.drop(F.dropout(self.beside(x), 0.3, self.training))


class Stack(nn.Module):
    """A head outside the blocks, after attention blocks with something beside the attention."""

    def __init__(self, beside, head=None):
        super().__init__()
        self.blocks = nn.ModuleList([Block(nn.Linear(WIDTH, WIDTH)), Block(beside)])
        self.head = nn.Identity() if head is None else head

    def forward(self, x, scale=1.0):
        for block in self.blocks:
            x = block(x)
        return {"logits": self.head(x) * scale}


class By(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Convolved(nn.Module):
    def __init__(self, gate=1.0, **options):
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, **options)
        self.gate = nn.Parameter(torch.tensor(gate))

    def forward(self, x):
        return self.gate * self.conv(x.transpose(1, 2)).transpose(1, 2)[:, : x.shape[1]]


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class Gathered(nn.Module):
    """Rows sent to one of two experts, as mixtures of experts do."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])

    def forward(self, x):
        rows = x.flatten(0, 1)
        chosen = (rows[:, 0] > 0).long()
        out = torch.zeros_like(rows)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(rows[chosen == index])
        return out.view(x.shape)


MIXED = {
    "causal convolution": (lambda: Convolved(padding=2), "blocks.1.beside"),
    "dilated convolution": (lambda: Convolved(padding=20, dilation=20), "blocks.1.beside"),
    "convolution behind a zero": (lambda: Convolved(0.0, padding=1), "blocks.1.beside"),
    "token shift": (lambda: By(lambda x: F.pad(x, (0, 0, 1, -1))), "blocks.1.beside"),
    "mean": (lambda: By(lambda x: x.mean(1, keepdim=True).expand_as(x)), "blocks.1.beside"),
    "running sum": (lambda: By(lambda x: x.cumsum(1)), "blocks.1.beside"),
    "norm over positions": (lambda: By(lambda x: F.normalize(x, dim=1)), "blocks.1.beside"),
    "softmax over positions": (lambda: By(lambda x: x.softmax(1)), "blocks.1.beside"),
    "reversed": (lambda: By(lambda x: x.flip(1)), "blocks.1.beside"),
    "counted positions": (
        lambda: By(lambda x: torch.sin(torch.arange(float(x.shape[1]))[:, None] + 0 * x)),
        "blocks.1.beside",
    ),
    "batch norm in training": (Normed, "blocks.1.beside"),
}
POINTWISE = {
    "linear": lambda: nn.Linear(WIDTH, WIDTH),
    "convolution of one position": lambda: By(
        nn.Sequential(nn.Unflatten(1, (-1, 1)), nn.Flatten(1, 2))
    ),
    "experts": Gathered,
    "norm over channels": lambda: nn.LayerNorm(WIDTH),
    "instances flattened": lambda: By(lambda x: x.flatten(0, 1).sin().view(x.shape)),
    "dropout": lambda: nn.Dropout(0.5),
}
ATTENTION = ("blocks.*.attn",)


def outcome(make, plan, whole, *, blocks=None, training=True, cast=torch.float32):
    """Text of the refusal, or the last line of the plan's explanation; and what was left behind."""
    torch.manual_seed(0)
    model = make().to(cast).train(training)
    # after attaching, as data-parallel wrappers and users' own hooks come
    calls, before = [], copy.deepcopy(model.state_dict())
    hp.parallelize(model, plan, way=hp.Route(attention=ATTENTION, blocks=blocks))
    handles = [m.register_forward_hook(lambda *_: calls.append(1)) for m in model.blocks]
    modes = [m.training for m in model.modules()]
    hooks = [list(m._forward_hooks.values()) for m in model.modules()]
    x = (whole if blocks else whole[:, plan.positions]).to(cast)
    state, text = torch.get_rng_state(), None
    try:
        out = model(x, scale=2.0)["logits"]
        assert out.shape == x.shape
        assert len(calls) == len(handles)
        assert any(p.requires_grad for p in model.parameters()) == out.requires_grad
    except SequenceError as error:
        text = str(error)
        assert not calls
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(SequenceError, match="mixes positions"):  # and again
            model(x, scale=2.0)
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name]), name
    assert modes == [m.training for m in model.modules()]
    assert hooks == [list(m._forward_hooks.values()) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())
    return text or plan.explain().splitlines()[-1]


def all_outcomes():
    mesh, found = line(), {}
    whole = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    for method in ("ring", "ulysses"):
        plan = hp.plan_sequence(mesh, length=LENGTH, method=method)
        for blocks in (None, "blocks") if method == "ring" else (None,):
            for name, (beside, _) in MIXED.items():
                found[name, method, blocks] = outcome(
                    lambda beside=beside: Stack(beside()), plan, whole, blocks=blocks
                )
            if method == "ulysses":
                continue
            for name, beside in POINTWISE.items():
                plan = plan.with_length(LENGTH)
                found[name, method, blocks] = outcome(
                    lambda beside=beside: Stack(beside()), plan, whole, blocks=blocks
                )
    return found


def test_what_mixes_is_refused_by_name_and_what_does_not_is_not():
    for found in launch(all_outcomes, 2):
        for (name, *_), text in found.items():
            if name in MIXED:
                assert f"mixes positions outside its attention, in module '{MIXED[name][1]}" in text
            else:
                assert text == "Stack: nothing but attention mixes positions", name


class Pooled(nn.Module):
    def forward(self, x):
        return x.mean(1)


def others():
    mesh, found = line(), {}
    whole = torch.randn(2, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))
    plan = hp.plan_sequence(mesh, length=LENGTH)
    conv, linear = (lambda: Stack(Convolved(padding=1))), (lambda: Stack(nn.Linear(WIDTH, WIDTH)))
    for cast in (torch.bfloat16, torch.float64):
        for name, make in (("conv", conv), ("linear", linear)):
            plan = plan.with_length(LENGTH)
            found[name, cast] = outcome(make, plan, whole, cast=cast)
    plan = plan.with_length(LENGTH)
    found["frozen"] = outcome(lambda: Stack(Normed()), plan, whole, training=False)
    found["pooled"] = outcome(lambda: Stack(nn.Linear(WIDTH, WIDTH), Pooled()), plan, whole)
    short = plan.with_length(2 * mesh.world + 1)
    found["short"] = outcome(conv, short, whole[:, : short.length])
    fixed = plan.with_length(LENGTH)
    rows = len(fixed.positions)
    tokens = nn.Linear(rows, rows)
    by = By(lambda x: tokens(x.transpose(1, 2)).transpose(1, 2))
    found["tokens mixed by a matrix"] = outcome(lambda: Stack(by), fixed, whole)
    return found


def test_precision_modes_outputs_and_what_cannot_be_told():
    for found in launch(others, 3):
        assert all("blocks.1.beside" in t for (k, _), t in list(found.items())[:4] if k == "conv")
        assert "nothing but attention" in found["linear", torch.bfloat16]
        assert "nothing but attention" in found["linear", torch.float64]
        assert "nothing but attention" in found["frozen"]
        assert "this Stack mixes positions outside its attention, in its own" in found["pooled"]
        assert "not known whether only attention mixes positions: a rank holds" in found["short"]
        assert "'blocks.1.beside' failed on" in found["tokens mixed by a matrix"]


# ------------------------------------------------------------------------- models of libraries


def lfm():
    """Attention layers and convolutions along the sequence."""
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["full_attention", "conv"]
    return Lfm2ForCausalLM(Lfm2Config(**sizes, **heads, layer_types=kinds))


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, attention_dropout=0.2))


def answers(wrapped):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    mesh, found = line(), {}
    tokens = torch.randint(0, 31, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    seen = torch.ones(2, LENGTH, dtype=torch.long)
    seen[1, 70:] = 0
    for make in (lfm, llama):
        for counted in (True, False):
            plan = hp.plan_sequence(mesh, length=LENGTH, mask=hp.Mask(causal=True))
            torch.manual_seed(0)
            model = hp.parallelize(make().train(), plan)
            if wrapped == "fsdp":
                for layer in model.model.layers:
                    fully_shard(layer, mesh=mesh.device_mesh)
                fully_shard(model, mesh=mesh.device_mesh)
            elif wrapped == "ddp":
                model = DistributedDataParallel(model)
            part = plan.shard({"input_ids": tokens, "attention_mask": seen})
            if not counted:
                del part["position_ids"]
            try:
                model(**part).logits.sum().backward()
                found[make.__name__, counted] = plan.explain().splitlines()[-1]
            except SequenceError as error:
                found[make.__name__, counted] = str(error)
    return found


@pytest.mark.parametrize("wrapped", [pytest.param("plain", marks=pytest.mark.slow), "ddp", "fsdp"])
def test_language_models_of_transformers(wrapped):
    """Convolutions are refused, and positions that each rank would count from 0."""
    for name in ("lfm2", "llama"):  # imported once, before ranks are forked
        pytest.importorskip(f"transformers.models.{name}.modeling_{name}")
    for found in launch(answers, 2, wrapped):
        assert "in module 'model.layers.1.conv' (Lfm2ShortConv)" in found["lfm", True]
        assert found["llama", True].endswith(  # fully_shard renames the class
            "LlamaForCausalLM: nothing but attention mixes positions"
        )
        assert "mixes positions outside its attention, in module 'model' " in found["llama", False]
        assert "position_ids of plan.shard" in found["llama", False]


def images():
    with placeholders("torchvision"):
        import timm

    class TokenNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(24)

        def forward(self, x):
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    sizes = {"img_size": 48, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
    mesh, found = line(), []
    for changed in (False, True):
        model = timm.create_model("vit_tiny_patch16_224", **sizes)
        if changed:
            model.blocks[1].norm2 = TokenNorm()
        plan = hp.plan_sequence(mesh, length=10)
        hp.parallelize(model, plan)
        try:
            model(torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1)))
            found.append(plan.explain().splitlines()[-1])
        except SequenceError as error:
            found.append(str(error))
    return found


def test_a_vision_transformer_with_batch_norm_over_its_tokens():
    if find_spec("timm") is None:
        pytest.skip("needs timm, which is not installed")
    for plain, changed in launch(images, 2):
        assert plain == "VisionTransformer: nothing but attention mixes positions"
        assert "in module 'blocks.1.norm2.norm' (BatchNorm1d)" in changed


def speech():
    """Convolutions before the blocks are no obstacle: the stream is cut after them."""
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    convs = {"conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3]}
    rest = {"intermediate_size": 40, "num_conv_pos_embeddings": 8}
    config = Wav2Vec2Config(**sizes, **convs, **rest, num_conv_pos_embedding_groups=2)
    mesh = line()
    torch.manual_seed(0)
    model = Wav2Vec2Model(config).double().eval()
    sound = torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    want = model(sound).last_hidden_state
    plan = hp.plan_sequence(mesh, length=want.shape[1])
    hp.parallelize(model, plan, way=hp.Route(blocks="encoder.layers"))
    got = model(sound).last_hidden_state
    return float((got - want).detach().abs().max()), plan.explain().splitlines()[-1]


def test_a_stream_that_is_cut_after_the_convolutions():
    pytest.importorskip("transformers.models.wav2vec2.modeling_wav2vec2")
    for far, text in launch(speech, 3):
        assert far < 1e-12
        assert text == "Wav2Vec2Model: nothing but attention mixes positions"
