"""Sequence plans: batches cut, labels shifted, models of libraries routed without edits."""

import copy
import os
from importlib.util import find_spec

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from hairpin.bench.absent import placeholders
from hairpin.comm.mesh import Mesh, init_mesh
from hairpin.comm.topology import Tier
from hairpin.errors import MemoryBudgetError, SequenceError
from hairpin.planning.sequence.patterns import unknown_pattern
from hairpin.run.launch import launch
from marks import slow

WIDE = torch.float64
METHODS = ("ring", "ulysses", "usp", "all_gather")


def line(**degrees) -> Mesh:
    return init_mesh(**(degrees or {"sp": int(os.environ["WORLD_SIZE"])}), timeout_s=60)


# ------------------------------------------------------------------------------ batches and losses


def a_plan(length=10, ranks=1, **options):
    options = {"mask": hp.Mask(causal=True), "length": length} | options
    return hp.plan_sequence(Mesh(sp=ranks), **options)


def test_a_batch_is_cut_with_shifted_labels_and_positions():
    documents = (4, 0, 1, 5)
    plan = a_plan(mask=hp.Mask(causal=True, documents=documents))
    tokens = torch.arange(10).expand(2, -1)
    part = plan.shard({"input_ids": tokens, "labels": tokens})
    assert part["input_ids"].tolist()[0] == list(range(10))
    assert part["position_ids"].tolist()[1] == [0, 1, 2, 3, 0, 0, 1, 2, 3, 4]
    assert part["shift_labels"].tolist()[0] == [1, 2, 3, -100, -100, 6, 7, 8, 9, -100]
    assert "labels" not in part


@pytest.mark.parametrize("method", METHODS)
def test_the_parts_of_all_ranks_are_the_whole(method):
    plans = []
    for rank in range(4):
        plan = a_plan(13, ranks=4, method=method)
        object.__setattr__(plan.split, "positions", plan.split.positions_of(rank))
        plans.append(plan)
    whole = torch.arange(13)[None]
    parts = [plan.shard({"tokens": whole})["tokens"] for plan in plans]
    assert sorted(torch.cat(parts, 1)[0].tolist()) == list(range(13))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ({}, "needs one of input_ids"),
        ({"input_ids": torch.zeros(1, 9)}, "length=9"),
        ({"input_ids": torch.zeros(1, 10), "w": torch.ones(2)}, r"batch\['w'\] has shape \(2,\)"),
        ({"input_ids": torch.zeros(1, 10), "w": torch.ones(2, 3)}, r"'w'.*\(2, 3\); give \[b, 10,"),
        ({"input_ids": torch.zeros(1, 10), "position_ids": torch.zeros(1, 10)}, "leave it out"),
        ({"input_ids": torch.zeros(1, 10), "labels": torch.zeros(1, 9)}, "not shifted"),
    ],
)
def test_batches_that_cannot_be_cut(batch, words):
    with pytest.raises(SequenceError, match=words):
        a_plan().shard(batch)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "spiral"}, "write one of auto, ring"),
        ({"method": "ulysses", "heads_degree": 2, "ranks": 4}, "has heads_degree=4, got 2"),
        ({"method": "usp", "heads_degree": 3, "ranks": 4}, "does not divide the 4 ranks"),
        ({"method": "linear", "order": "zigzag"}, "leave order out"),
        ({"mask": hp.Mask(documents=(1, 2))}, "have 3 positions together"),
        ({"axis": "tp"}, "no axis 'tp'"),
        ({"method": "auto"}, "give shape="),
        ({"memory": "1GiB"}, "give method='auto'|or method='auto'"),
        ({"turns": 0}, "turns=0 of schedule 'ring'"),
        ({"turns": 2, "method": "auto"}, "leave turns out"),
        ({"length": None}, "needs length="),
    ],
)
def test_plans_that_cannot_be(options, words):
    with pytest.raises(ValueError, match=words):
        a_plan(**options)


def test_masks_that_linear_attention_does_not_know_are_refused():
    plan = a_plan(method="linear", mask=hp.Mask(causal=True, window=4))
    x = torch.zeros(1, 2, 10, 4)
    with pytest.raises(SequenceError, match="leave out window, prefix and blocks"):
        plan.linear_attention(x, x, x)


def test_a_plan_explains_itself():
    text = a_plan(1000, ranks=8, method="usp", heads_degree=2).explain()
    assert "4 ring places x 2 heads places" in text
    assert "dealt zigzag: 125 to 125 positions a rank" in text


LINKS = {"inner": Tier(1e-5, 20e9), "outer": Tier(1e-4, 1e9)}


@pytest.mark.parametrize(("groups", "inside"), [(8, False), (2, True)])
def test_the_fastest_method_depends_on_the_links_and_the_heads(groups, inside):
    """On two hosts, many key heads keep the ring inside a host, few let it go across."""
    shape = hp.AttentionShape(
        length=8192, heads=8, head_dim=64, groups=groups, mask=hp.Mask(causal=True)
    )
    topology = hp.Topology.two_tier(2, 2, **LINKS)
    plan = hp.plan_sequence(Mesh(sp=4), method="auto", shape=shape, topology=topology)
    usp = next(c for c in plan.candidates if c.heads == 2 and c.schedule == "ring")
    assert usp.heads_inside is inside
    assert plan.candidates[0].time_s == min(c.time_s for c in plan.candidates if not c.excluded)
    assert plan.length == 8192
    assert plan.candidates[0].method in plan.explain()


def test_no_method_is_chosen_that_holds_more_than_is_allowed():
    shape = hp.AttentionShape(length=8192, heads=8, head_dim=64)
    topology = hp.Topology.flat(4, LINKS["inner"])
    free = hp.plan_sequence(Mesh(sp=4), method="auto", shape=shape, topology=topology)
    most = max(c.peak_bytes for c in free.candidates)
    tight = hp.plan_sequence(
        Mesh(sp=4), method="auto", shape=shape, topology=topology, memory=most // 2
    )
    assert tight.candidates[-1].excluded
    assert tight.candidates[0].peak_bytes < most
    with pytest.raises(hp.MemoryBudgetError, match="no method holds one attention layer in 1KiB"):
        hp.plan_sequence(Mesh(sp=4), method="auto", shape=shape, topology=topology, memory="1KiB")
    with pytest.raises(SequenceError, match="the topology is of 4 ranks and axis 'sp' has 2"):
        hp.plan_sequence(Mesh(sp=2), method="auto", shape=shape, topology=topology)


def stream_on_ranks():
    mesh, found = line(), []
    whole = torch.randn(2, 11, 3, dtype=WIDE, generator=torch.Generator().manual_seed(0))
    for method in METHODS:
        plan = hp.plan_sequence(mesh, length=11, mask=hp.Mask(causal=True), method=method)
        for grad in ("replicated", "partial"):
            part = whole[:, plan.positions].clone().requires_grad_()
            together = plan.gather(part, grad=grad)
            weights = torch.arange(66, dtype=WIDE).view(2, 11, 3)
            share = 1.0 if grad == "replicated" else mesh.global_rank + 1.0
            (together * weights * share).sum().backward()
            world = mesh.world
            factor = world if grad == "replicated" else world * (world + 1) / 2
            if not torch.equal(together, whole):
                found.append(f"{method}: values")
            if not torch.allclose(part.grad, weights[:, plan.positions] * factor):
                found.append(f"{method} {grad}: gradient")
    return found


@pytest.mark.parametrize("world", [1, 3, 4])
def test_a_sequence_is_put_together(world):
    for found in launch(stream_on_ranks, world):
        assert found == []


# ------------------------------------------------------------------------- models of transformers


def seeded(make):
    torch.manual_seed(0)
    model = make().to(WIDE)
    for p in model.parameters():
        nn.init.normal_(p, std=0.2)
    return model


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **changes))


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads, **window))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=31, n_embd=24, n_layer=2, n_head=4, **drop))


def esm2(**changes):
    from transformers import EsmConfig, EsmForMaskedLM

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"intermediate_size": 32, "position_embedding_type": "rotary", "pad_token_id": 1}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return EsmForMaskedLM(EsmConfig(vocab_size=31, **sizes, **rest, **drop, **changes))


LANGUAGE = {"llama": (llama, True), "qwen3": (qwen3, True), "gpt2": (gpt2, True)}
LANGUAGE["esm2"] = (esm2, False)


def loss_terms(logits, labels):
    """Sum over the tokens that have a label, and how many they are."""
    flat = labels.flatten()
    return F.cross_entropy(logits.flatten(0, 1), flat, reduction="sum"), (flat != -100).sum()


def tokens_of(length, batch=2):
    made = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 31, (batch, length), generator=made)
    labels = tokens.clone()
    labels[:, : length // 2] = -100  # so that some ranks have no label at all
    return {"input_ids": tokens, "labels": labels}


def alone(model, batch, *, mask=None):
    """Loss and gradients of one process, the model as its library runs it."""
    extra = {} if mask is None else {"attention_mask": mask}
    logits = model(input_ids=batch["input_ids"], **extra).logits
    total, count = loss_terms(logits[:, :-1], batch["labels"][:, 1:])
    loss = total / count
    loss.backward()
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def split(model, batch, plan, *, mask=None):
    """The same over the ranks of a plan."""
    hp.parallelize(model, plan)
    model.zero_grad()
    whole = dict(batch) if mask is None else {**batch, "attention_mask": mask}
    part = plan.shard(whole)
    labels = part.pop("shift_labels")
    cached = {} if "Esm" in type(model).__name__ else {"use_cache": False}
    total, count = loss_terms(model(**part, **cached).logits, labels)
    loss = plan.loss(total, count)
    loss.backward()
    hp.sync_grads(model, plan.split.mesh)
    assert hp.detach(model) is plan
    return float(loss.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def far(got, want, tolerance):
    """Names of what differs, relative to the largest gradient."""
    scale = max(float(g.abs().max()) for g in want[1].values())
    found = [] if abs(got[0] - want[0]) <= tolerance * abs(want[0]) else ["loss"]
    if set(got[1]) != set(want[1]):
        found.append(f"parameters {set(got[1]) ^ set(want[1])}")
    return found + [
        n for n, g in want[1].items() if float((g - got[1][n]).abs().max()) > tolerance * scale
    ]


def language_on_ranks(names, methods):
    mesh, found = line(), []
    for name in names:
        make, causal = LANGUAGE[name]
        for padded in (False, True):
            batch = tokens_of(15)
            mask = None
            if padded:
                mask = torch.ones(2, 15, dtype=torch.long)
                mask[1, 9:] = 0
                batch["labels"][1, 9:] = -100
            want = alone(seeded(make), batch, mask=mask)
            for method in methods:
                plan = hp.plan_sequence(mesh, length=15, mask=hp.Mask(causal=causal), method=method)
                got = split(seeded(make), batch, plan, mask=mask)
                found += [f"{name} {method} padded={padded}: {n}" for n in far(got, want, 1e-10)]
    return found


def transformers_here():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_language_model_unedited_on_two_ranks(name):
    transformers_here()
    for found in launch(language_on_ranks, 2, [name], METHODS[:2]):
        assert found == []


def test_llama_and_esm_unedited_on_four_ranks():
    transformers_here()
    for found in launch(language_on_ranks, 4, ["llama", "esm2"], METHODS):
        assert found == []


def packed_on_ranks():
    """Documents packed in one row: as each alone."""
    mesh, found = line(), []
    documents = (5, 1, 9)
    tokens = tokens_of(15, batch=1)
    tokens["labels"] = tokens["input_ids"].clone()
    model = seeded(llama)
    total, count = 0.0, 0
    for ids in tokens["input_ids"].split(list(documents), 1):
        one = loss_terms(model(input_ids=ids).logits[:, :-1], ids[:, 1:])
        total, count = total + one[0], count + one[1]
    (total / count).backward()
    want = float((total / count).detach()), {n: p.grad.clone() for n, p in model.named_parameters()}
    for method in METHODS[:3]:
        mask = hp.Mask(causal=True, documents=documents)
        plan = hp.plan_sequence(mesh, length=15, mask=mask, method=method)
        got = split(seeded(llama), tokens, plan)
        found += [f"{method}: {n}" for n in far(got, want, 1e-10)]
    return found


def test_packed_documents_are_as_each_alone():
    transformers_here()
    for found in launch(packed_on_ranks, 4):
        assert found == []


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"intermediate_size": 32, "image_size": 12, "patch_size": 4, "num_labels": 5}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return ViTForImageClassification(ViTConfig(**sizes, **rest, **drop))


def timm_vit():
    with placeholders("torchvision"):  # timm asks for it where it trains
        import timm

    return timm.create_model(
        "vit_tiny_patch16_224", img_size=48, embed_dim=24, depth=2, num_heads=4, num_classes=5
    )


def image_loss(model, images):
    logits = model(images)
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits, torch.tensor([1, 3]))


def images_on_ranks(name):
    mesh, found = line(), []
    make, side, length = {"vit": (vit, 12, 10), "timm": (timm_vit, 48, 10)}[name]
    images = torch.randn(2, 3, side, side, dtype=WIDE, generator=torch.Generator().manual_seed(2))
    model = seeded(make)
    loss = image_loss(model, images)
    loss.backward()
    want = float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}
    for method in METHODS[:2]:
        model = seeded(make)
        plan = hp.plan_sequence(mesh, length=length, mask=hp.Mask(), method=method)
        hp.parallelize(model, plan)
        loss = image_loss(model, images)
        loss.backward()
        hp.sync_grads(model, mesh)
        got = float(loss.detach()), {n: p.grad.clone() for n, p in model.named_parameters()}
        found += [f"{name} {method}: {n}" for n in far(got, want, 1e-10)]
    return found


@pytest.mark.parametrize("name", ["vit", "timm"])
def test_an_image_transformer_unedited_with_its_class_token(name):
    """Ten positions, the class token among them, over three ranks."""
    if find_spec("transformers" if name == "vit" else "timm") is None:
        pytest.skip(f"needs the library of {name}, which is not installed")
    for found in launch(images_on_ranks, 3, name):
        assert found == []


def wan_on_ranks(methods):
    from diffusers import WanTransformer3DModel

    def make():
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=8,
            freq_dim=8,
            ffn_dim=32,
            num_layers=2,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        )

    made = torch.Generator().manual_seed(3)
    args = {
        "hidden_states": torch.randn(1, 4, 3, 6, 4, dtype=WIDE, generator=made),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 6, 8, dtype=WIDE, generator=made),
    }
    mesh, found = line(), []
    model = seeded(make)
    whole = model(**args).sample
    whole.square().mean().backward()
    want = 1.0, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for method in methods:
        model = seeded(make)
        plan = hp.plan_sequence(mesh, length=18, mask=hp.Mask(), method=method)
        hp.parallelize(model, plan)
        out = model(**args).sample
        out.square().mean().backward()
        hp.sync_grads(model, mesh)
        if not torch.allclose(out, whole, rtol=0, atol=1e-10):
            found.append(f"{method}: output")
        got = 1.0, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        # its norms and modulations are float32 whatever the model's dtype
        found += [f"{method}: {n}" for n in far(got, want, 1e-6)]
    return found


@pytest.mark.parametrize(
    ("world", "methods"), [(2, ["usp"]), pytest.param(4, METHODS, marks=pytest.mark.slow)]
)
def test_wan_unedited_with_its_rotary_embedding_and_text(world, methods):
    """Full attention over frames and patches; the text's cross-attention stays on every rank."""
    pytest.importorskip("diffusers")
    for found in launch(wan_on_ranks, world, methods):
        assert found == []


def sd3():
    """The second block attends within the picture too, the last one drops the text."""
    from diffusers import SD3Transformer2DModel

    sizes = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4}
    heads = {"attention_head_dim": 8, "num_attention_heads": 3, "caption_projection_dim": 24}
    rest = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "pos_embed_max_size": 8}
    model = SD3Transformer2DModel(
        **sizes, **heads, **rest, num_layers=3, dual_attention_layers=(1,)
    )
    given = {"hidden_states": (2, 4, 8, 6), "encoder_hidden_states": (2, 5, 12)}
    return (
        model,
        given | {"pooled_projections": (2, 10)},
        {"timestep": torch.tensor([3.0, 5.0])},
        12,
    )


def flux():
    """Blocks of both kinds, rotary embeddings over text and picture."""
    from diffusers import FluxTransformer2DModel

    heads = {"attention_head_dim": 8, "num_attention_heads": 3, "axes_dims_rope": (2, 2, 4)}
    rest = {"joint_attention_dim": 12, "pooled_projection_dim": 10, "in_channels": 4}
    model = FluxTransformer2DModel(**heads, **rest, num_layers=2, num_single_layers=2)
    given = {"hidden_states": (2, 15, 4), "encoder_hidden_states": (2, 5, 12)}
    at = torch.arange(45.0).view(15, 3)
    more = {"img_ids": at, "txt_ids": torch.zeros(5, 3), "timestep": torch.tensor([0.3, 0.5])}
    return model, given | {"pooled_projections": (2, 10)}, more, 15


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    sizes = {"in_channels": 4, "out_channels": 4, "sample_width": 6, "sample_height": 4}
    heads = {"attention_head_dim": 8, "num_attention_heads": 3, "time_embed_dim": 10}
    rest = {"text_embed_dim": 12, "max_text_seq_length": 5, "sample_frames": 9}
    rotary = {"use_rotary_positional_embeddings": True}
    model = CogVideoXTransformer3DModel(**sizes, **heads, **rest, **rotary, num_layers=2)
    given = {"hidden_states": (2, 3, 4, 4, 6), "encoder_hidden_states": (2, 5, 12)}
    turns = torch.arange(18.0 * 8).view(18, 8) / 9
    more = {"image_rotary_emb": (turns.cos(), turns.sin()), "timestep": torch.tensor([3, 5])}
    return model, given, more, 18


JOINT = {
    "transformer_sd3": sd3,
    "transformer_flux": flux,
    "cogvideox_transformer_3d": cogvideox,
}


def joint_on_ranks(name, methods):
    mesh, found = line(), []
    _, shapes, more, length = JOINT[name]()
    made = torch.Generator().manual_seed(3)
    args = {n: torch.randn(s, dtype=WIDE, generator=made) for n, s in shapes.items()} | more
    model = seeded(lambda: JOINT[name]()[0])
    whole = model(**args).sample
    whole.square().mean().backward()
    want = 1.0, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    for method in methods:
        model = seeded(lambda: JOINT[name]()[0])
        plan = hp.plan_sequence(mesh, length=length, method=method)
        hp.parallelize(model, plan)
        out = model(**args).sample
        out.square().mean().backward()
        hp.sync_grads(model, mesh)
        assert plan.explain().endswith("nothing but attention mixes positions")
        if not torch.allclose(out, whole, rtol=0, atol=1e-9 * float(whole.detach().abs().max())):
            found.append(f"{name} {method}: output")
        got = 1.0, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found += [f"{name} {method}: {n}" for n in far(got, want, 1e-9)]
    return found


@pytest.mark.parametrize("name", JOINT)
@pytest.mark.parametrize(
    ("world", "methods"), [(2, METHODS[:2]), pytest.param(4, METHODS, marks=pytest.mark.slow)]
)
def test_pictures_and_films_that_attend_jointly_with_their_text(name, world, methods):
    """The text stays whole on every rank: three heads, parts that are not equal."""
    pytest.importorskip(f"diffusers.models.transformers.{name}")
    for found in launch(joint_on_ranks, world, name, methods):
        assert found == []


def trained(sp, steps, dtype):
    """Losses of some steps of a small Llama on one mesh."""
    mesh = line(dp=1, sp=sp)
    model = seeded(llama).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    plan = hp.plan_sequence(mesh, length=21, mask=hp.Mask(causal=True))
    hp.parallelize(model, plan)
    made = torch.Generator().manual_seed(4)
    losses = []
    for _ in range(steps):
        tokens = torch.randint(0, 31, (2, 21), generator=made)
        part = plan.shard({"input_ids": tokens, "labels": tokens})
        labels = part.pop("shift_labels")
        loss = plan.loss(*loss_terms(model(**part, use_cache=False).logits, labels))
        optimizer.zero_grad()
        loss.backward()
        hp.sync_grads(model, mesh)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("steps", "dtype", "tolerance"),
    [(15, WIDE, 1e-10), slow(50, WIDE, 1e-10), slow(50, torch.float32, 1e-4)],
)
def test_training_is_the_same_on_one_two_and_four_ranks(steps, dtype, tolerance):
    transformers_here()
    (one,) = launch(trained, 1, 1, steps, dtype)
    for sp in (2, 4):
        for losses in launch(trained, sp, sp, steps, dtype):
            assert max(abs(a - b) / abs(a) for a, b in zip(one, losses, strict=True)) <= tolerance


def dropping_gpt2():
    """Dropout everywhere: in the attention and beside it."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": 31, "n_embd": 24, "n_layer": 2, "n_head": 4}
    drop = {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2}
    return GPT2LMHeadModel(GPT2Config(**sizes, **drop))


def dropping_opt():
    """Dropout by function, of positions and batch in one dim too."""
    from transformers import OPTConfig, OPTForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 24, "num_hidden_layers": 2, "ffn_dim": 40}
    drop = {"dropout": 0.3, "attention_dropout": 0.2}
    return OPTForCausalLM(OPTConfig(**sizes, **drop, num_attention_heads=4))


def recompute_layers(model):
    renamed = getattr(model, "activation_checkpointing_enable", None)
    (renamed or model.gradient_checkpointing_enable)({"use_reentrant": False})


def dropping_on_ranks(make, recomputed):
    """With and without recomputing, of the whole model or of its layers."""
    found = {}
    for mesh in (Mesh(sp=1), line()):
        model = seeded(make).train()
        if recomputed == "layers":
            recompute_layers(model)
        plan = hp.plan_sequence(mesh, length=15, mask=hp.Mask(causal=True))
        hp.parallelize(model, plan)
        part = plan.shard(tokens_of(15))
        labels = part.pop("shift_labels")
        torch.manual_seed(5)
        options = {**part, "use_cache": False}
        again = recomputed == "all"
        out = checkpoint(model, use_reentrant=False, **options) if again else model(**options)
        logits = out.logits
        loss = plan.loss(*loss_terms(logits, labels))
        loss.backward()
        hp.sync_grads(model, mesh)
        found[mesh.world] = float(loss.detach()), {n: p.grad for n, p in model.named_parameters()}
    one, many = found[1], found[mesh.world]
    return far(many, one, 1e-10)


@pytest.mark.parametrize(
    ("make", "recomputed"),
    [
        pytest.param(dropping_gpt2, "nothing", marks=pytest.mark.slow),
        (dropping_gpt2, "all"),
        (dropping_opt, "nothing"),
        (dropping_opt, "layers"),
    ],
)
def test_dropout_in_a_model_is_the_same_on_any_number_of_ranks(make, recomputed):
    transformers_here()
    for found in launch(dropping_on_ranks, 3, make, recomputed):
        assert found == []


def dropping(p, length=6, ranks=1, rank=0):
    """A dropout of a model that carries a plan, seen from one rank."""
    model = nn.Sequential(Attends(), nn.Dropout(p))
    plan = a_plan(length, ranks=ranks)
    object.__setattr__(plan.split, "positions", plan.split.positions_of(rank))
    hp.parallelize(model, plan, way=hp.Route(attention=("0",)))
    return model[1].train()


@pytest.mark.parametrize("shape", [(2, 0, 4), (2, 0), (0, 0, 4), (0, 3, 4)])
def test_dropout_of_nothing_is_nothing(shape):
    dropout = dropping(0.5, length=3, ranks=4, rank=3) if shape[1] == 0 else dropping(0.5, 3)
    assert dropout(torch.zeros(shape)).shape == shape


def test_dropout_where_positions_are_not_seen_is_refused_by_name():
    dropout = dropping(0.5, length=12, ranks=4, rank=1)
    with pytest.raises(SequenceError, match=r"module '1' drops .* \(5, 2, 3, 4\), .* 3 positions"):
        dropout(torch.ones(5, 2, 3, 4))
    assert dropout.eval()(torch.ones(5, 2, 3, 4)).eq(1).all()


class Dropped(nn.Module):
    """Dropout of a model's own: by function, in place, its module called by a child too."""

    def __init__(self):
        super().__init__()
        self.attn, self.drop = Attends(), nn.Sequential(nn.Dropout(0.5))

    def forward(self, x):
        y = x.clone()
        F.dropout(y, 0.25, self.training, True)
        return self.drop(y), F.dropout(x, training=self.training)


def test_dropout_by_function_is_in_place_where_asked_and_off_after_detaching():
    model = Dropped()
    model.forward = own = model.forward
    hp.parallelize(model, a_plan(), way=hp.Route(attention=("attn",)))
    x = torch.ones(2, 10, 50)
    torch.manual_seed(3)
    both, plain = model(x)
    assert sorted(both.unique().tolist()) == [0.0, pytest.approx(2 / 0.75)]
    assert 0.3 < float(both.ne(0).double().mean()) < 0.45
    assert plain.unique().tolist() == [0.0, 2.0]
    torch.manual_seed(3)
    assert torch.equal(model(x)[0], both)
    hp.detach(model)
    assert model.forward is own
    assert not any("forward" in child.__dict__ for child in model.children())


class Recomputed(nn.Module):
    """Recomputes a function of its forward, not a module."""

    def __init__(self, reentrant):
        super().__init__()
        self.attn, self.reentrant = Attends(), reentrant

    def forward(self, x):
        return checkpoint(F.dropout, x.sin(), 0.5, self.training, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [False, True])
def test_dropout_in_a_function_that_is_recomputed_is_refused_by_name(reentrant):
    model = nn.Sequential(Recomputed(reentrant))
    hp.parallelize(model, a_plan(), way=hp.Route(attention=("0.attn",)))
    with pytest.raises(SequenceError, match=r"module '0' calls F\.dropout in a part"):
        model(torch.ones(2, 10, 4, requires_grad=True))


def test_dropout_of_everything_has_no_gradient():
    x = torch.randn(2, 6, 4, requires_grad=True)
    y = dropping(1.0)(x)
    y.sum().backward()
    assert not y.any()
    assert x.grad.eq(0).all()


# --------------------------------------------------------------------------------- what is refused


def test_a_model_whose_attention_cannot_be_routed_is_refused_by_name():
    class Eager(nn.Module):
        def forward(self, x):
            return (x @ x.transpose(-1, -2)).softmax(-1) @ x

    with pytest.raises(SequenceError, match="no attention of this Eager can be routed"):
        hp.parallelize(Eager(), a_plan())


ROPES = {
    "dynamic": {"factor": 2.0},
    "longrope": {"short_factor": [1.0, 1.0], "long_factor": [2.0, 4.0]},
    "yarn": {"factor": 2.0},
    "linear": {"factor": 2.0},
}


@pytest.mark.parametrize("rope", ROPES)
def test_rotary_frequencies_that_follow_the_length_are_refused_above_the_original(rope):
    transformers_here()
    settings = {"rope_type": rope, "rope_theta": 1e4, **ROPES[rope]}
    if rope in ("longrope", "yarn"):
        settings["original_max_position_embeddings"] = 32
    positions = 32 if rope == "dynamic" else 64
    model = llama(rope_parameters=settings, max_position_embeddings=positions)
    if rope in ("dynamic", "longrope"):
        with pytest.raises(SequenceError, match=f"'model.rotary_emb' has rope_type='{rope}'.* 33 "):
            hp.parallelize(model, a_plan(33, ranks=2))
    else:
        hp.detach(hp.parallelize(model, a_plan(33, ranks=2)))
    for plan in (
        a_plan(32, ranks=2),
        a_plan(33),
        a_plan(60, ranks=2, mask=hp.Mask(causal=True, documents=(32, 28))),
    ):
        hp.detach(hp.parallelize(model, plan))


def test_embeddings_that_count_mask_tokens_are_refused_and_may_be_made_before():
    transformers_here()
    for found in launch(masked_on_ranks, 2):
        assert found == []


def masked_on_ranks():
    """ESM-2 as released, with mask tokens in one rank's part alone."""
    mesh = line()
    tokens = torch.randint(4, 31, (2, 15), generator=torch.Generator().manual_seed(1))
    tokens[:, 9:14:2] = 30
    model = seeded(lambda: esm2(token_dropout=True, mask_token_id=30)).eval()
    want = model(input_ids=tokens).logits
    plan = hp.plan_sequence(mesh, length=15)
    with pytest.raises(SequenceError, match=r"'esm\.embeddings' has token_dropout"):
        hp.parallelize(model, plan)
    embeds = model.esm.embeddings(input_ids=tokens)
    model.esm.embeddings.token_dropout = False
    hp.parallelize(model, plan)
    got = plan.gather(model(**plan.shard({"inputs_embeds": embeds})).logits)
    return [] if torch.allclose(got, want, atol=1e-10) else [float((got - want).abs().max())]


class Attends(nn.Module):
    def __init__(self, fused=True):
        super().__init__()
        self.fused = fused
        self.inner = nn.Linear(4, 4)

    def forward(self, x):
        y = self.inner(x)[:, None]
        return F.scaled_dot_product_attention(y, y, y, is_causal=True)[:, 0] if self.fused else x


def test_named_modules_are_watched_and_must_attend():
    whole = Attends()
    x = torch.randn(1, 10, 4)
    want = whole(x)
    model = nn.Sequential(copy.deepcopy(whole))
    hp.parallelize(model, a_plan(), way=hp.Route(attention=("0",)))
    torch.testing.assert_close(model(x), want)
    hp.detach(model)
    assert "forward" not in model[0].__dict__
    model = nn.Sequential(Attends(fused=False))
    hp.parallelize(model, a_plan(), way=hp.Route(attention=("0",)))
    with pytest.raises(SequenceError, match="'0' did not call"):
        model(x)


class Both(nn.Module):
    """Text and picture in one attention, the text first."""

    def forward(self, x, text):
        y = torch.cat([text, x], 1)[:, None]
        y = F.scaled_dot_product_attention(y, y, y)[:, 0]
        return y[:, text.shape[1] :], y[:, : text.shape[1]]


def test_a_stream_beside_the_split_one_is_seen_whole():
    whole, x, text = Both(), torch.randn(2, 10, 4), torch.randn(2, 3, 4)
    want = whole(x, text)
    model, way = nn.ModuleList([whole]), hp.Route(attention=("0",), beside="before")
    hp.parallelize(model, a_plan(mask=hp.Mask()), way=way)
    torch.testing.assert_close(whole(x, text), want)
    hp.detach(model)
    hp.parallelize(model, a_plan(), way=way)
    model[0].forward(x, text[:, :0])  # nothing beside it: any mask will do
    hp.detach(model)
    hp.parallelize(model, a_plan(mask=hp.Mask(window=3)), way=way)
    with pytest.raises(SequenceError, match="'0' attends to another stream too, under Mask"):
        whole(x, text)


def test_routes_that_name_nothing_leave_the_model_as_it_was():
    model = nn.Sequential(Attends())
    with pytest.raises(SequenceError, match="no module '1'"):
        hp.parallelize(model, a_plan(), way=hp.Route(attention=("1",)))
    model.add_module("empty", nn.ModuleList())
    with pytest.raises(SequenceError, match="no blocks in empty"):
        hp.parallelize(model, a_plan(), way=hp.Route(attention=("0",), blocks="empty"))
    with pytest.raises(SequenceError, match="no list of blocks at 'blocks'"):
        hp.parallelize(model, a_plan(), way=hp.Route(attention=("0",), blocks="blocks"))
    assert hp.detach(model) is None
    assert "forward" not in model[0].__dict__


def blocks_on_ranks():
    """A routed model under a mask by blocks, on some ranks and on one."""
    mesh, outs = line(), []
    seen = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)) > 0.5
    seen.fill_diagonal_(True)  # every query sees itself
    mask = hp.Mask(causal=True, blocks=hp.BlockSparse(3, seen))
    tokens = tokens_of(11)["input_ids"]
    for where in (Mesh(sp=1), mesh):
        plan = hp.plan_sequence(where, length=11, mask=mask)
        model = hp.parallelize(seeded(llama), plan)
        logits = model(**plan.shard({"input_ids": tokens}), use_cache=False).logits
        outs.append(plan.gather(logits).detach())
    dense = mask.sees(torch.arange(11), 11)
    want = seeded(llama)
    hidden = torch.zeros(11, 11, dtype=WIDE).masked_fill(~dense, -1e30)
    got = want(input_ids=tokens, attention_mask=hidden.expand(2, 1, -1, -1)).logits.detach()
    return [float((x - got).abs().max()) for x in outs]


def test_a_language_model_under_a_mask_by_blocks():
    transformers_here()
    for far_off in launch(blocks_on_ranks, 3):
        assert max(far_off) < 1e-10


def test_two_plans_on_one_model_are_refused():
    model = nn.Sequential(Attends())
    plan = a_plan()
    hp.parallelize(model, plan, way=hp.Route(attention=("0",)))
    with pytest.raises(SequenceError, match="already carries a sequence plan"):
        hp.parallelize(model, plan, way=hp.Route(attention=("0",)))
    assert hp.detach(model) is plan


def test_a_detached_model_of_transformers_is_as_before():
    transformers_here()
    model = seeded(llama)
    ids = tokens_of(15)["input_ids"]
    want, before = model(input_ids=ids).logits, model.config._attn_implementation
    hp.parallelize(model, a_plan(15))
    assert model.config._attn_implementation == "hairpin"
    hp.detach(model)
    assert model.config._attn_implementation == before
    assert torch.equal(model(input_ids=ids).logits, want)


def test_models_on_one_config_are_independent():
    transformers_here()
    model, other = seeded(llama), seeded(llama)
    other = type(other)(model.config).to(WIDE)
    ids = tokens_of(15)["input_ids"]
    want = other(input_ids=ids).logits
    hp.parallelize(model, a_plan(15))
    assert torch.equal(other(input_ids=ids).logits, want)
    hp.parallelize(other, a_plan(15))
    hp.detach(model)
    assert other.config._attn_implementation == "hairpin"


def test_another_attention_chosen_meanwhile_is_refused():
    transformers_here()
    model = seeded(llama)
    hp.parallelize(model, a_plan(15))
    model.set_attn_implementation("sdpa")
    with pytest.raises(SequenceError, match=r"attends with 'sdpa' now.*hp.detach"):
        model(input_ids=tokens_of(15)["input_ids"])


def test_masks_of_their_own_are_refused():
    transformers_here()
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=31, hidden_size=24, intermediate_size=40, intermediate_size_mlp=40,
        num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=4,
        num_local_experts=2, attention_chunk_size=4, pad_token_id=0,
    )  # fmt: skip
    model = Llama4ForCausalLM(config)
    hp.parallelize(model, a_plan(15))
    with pytest.raises(SequenceError, match="masks its attention with chunked_overlay"):
        model(input_ids=tokens_of(15)["input_ids"], use_cache=False)


def test_which_patterns_are_known():
    transformers_here()
    from transformers import masking_utils as masks

    causal, either = masks.causal_mask_function, masks.bidirectional_mask_function
    places = torch.arange(4)[None]
    packed = masks.packed_sequence_compatibility_function(causal, places, places)
    windowed = masks.sliding_window_causal_mask_function(4)
    for known in (causal, either, packed, windowed, masks.and_masks(windowed, either)):
        assert unknown_pattern(known, 4) is None
    assert unknown_pattern(windowed, 5) is not None  # which attentions do not say
    blocks = masks.blockwise_overlay(places)
    own = masks.packed_sequence_mask_function(places)
    for unknown in (
        masks.or_masks(causal, blocks),
        masks.and_masks(causal, own),
        masks.packed_sequence_compatibility_function(blocks, places, places),
        lambda b, h, q, k: q >= k,
    ):
        assert unknown_pattern(unknown, 4) is not None


@pytest.mark.parametrize("name", ["indices", "cu_seq_lens_q"])
def test_what_attention_over_ranks_does_not_know_is_refused(name):
    transformers_here()
    model = seeded(llama)
    hp.parallelize(model, a_plan(15))
    with pytest.raises(SequenceError, match=f"attends with '{name}'"):
        model(input_ids=tokens_of(15)["input_ids"], **{name: torch.zeros(3)})


def test_generation_with_a_cache_is_refused():
    transformers_here()
    model = seeded(llama)
    hp.parallelize(model, a_plan(15))
    with pytest.raises(SequenceError, match=r"hp.detach\(model\) before generate"):
        model.generate(tokens_of(15)["input_ids"], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("make", [llama, vit])
def test_a_copy_keeps_its_plan_when_the_other_comes_off(make):
    """Copies are made of models under way, for averages of weights; each has its own plan."""
    transformers_here()
    model = seeded(make)
    before = dict(model.__dict__)["config"]._attn_implementation
    length = 15 if make is llama else 10
    given = tokens_of(15)["input_ids"] if make is llama else torch.zeros(1, 3, 12, 12, dtype=WIDE)
    want = model(given).logits
    hp.parallelize(model, a_plan(length, mask=hp.Mask(causal=make is llama)))
    twin = copy.deepcopy(model)
    assert hp.detach(twin) is not None
    assert (twin.config._attn_implementation, model.config._attn_implementation) == (
        before,
        "hairpin",
    )
    torch.testing.assert_close(model(given).logits, want, rtol=0, atol=1e-10)
    assert torch.equal(twin(given).logits, want)
    hooks = [m for m in twin.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert not any(
        "forward" in m.__dict__ or "_hairpin_route" in m.__dict__ for m in twin.modules()
    )
    assert hp.detach(model) is not None


def test_a_batch_that_was_not_cut_is_refused():
    transformers_here()
    model = seeded(llama)
    hp.parallelize(model, a_plan(15))
    with pytest.raises(SequenceError, match="holds 15 of 15 positions"):
        model(input_ids=tokens_of(9)["input_ids"])


def test_turns_are_the_fewest_that_fit_the_memory():
    shape = hp.AttentionShape(length=4096, heads=4, head_dim=64, mask=hp.Mask(causal=True))
    mesh = Mesh(sp=4)
    ask = {"shape": shape, "method": "ring"}
    free = hp.plan_sequence(mesh, memory="1GiB", **ask)
    assert (free.split.turns, free.length, free.mask) == (1, 4096, shape.mask)
    tight = hp.plan_sequence(mesh, memory="12MiB", **ask)
    assert tight.split.turns > 1
    assert f"keys cross by ring in {tight.split.turns} turns" in tight.explain()
    assert hp.plan_sequence(mesh, length=8, turns=3).split.turns == 3
    with pytest.raises(MemoryBudgetError, match="in however many turns: one turn needs"):
        hp.plan_sequence(mesh, memory="1MiB", **ask)
