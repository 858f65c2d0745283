"""Third-party models, unmodified and at random weights, that the budget of memory is shown on.

Each is small (two layers, narrow) and has a long input, so that its activations, not its weights,
fill the memory: an eager forward peaks at tens to hundreds of MB and takes seconds on one core.
"""

import importlib
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from hairpin.bench.absent import placeholders
from hairpin.errors import MissingExtraError
from hairpin.run.profile import ProfileError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
_MOST_POSITIONS = 131_072


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, and inputs of any length for it.

    Attributes:
        name: of the model.
        variant: of its attention, ``"eager"`` or ``"sdpa"``; empty where it has one only.
        build: makes it with seeded random weights, in eval mode, in float32.
        build_longest: the same with a table of positions for very long inputs; None where
            ``build`` takes any length.
        inputs: the arguments and keyword arguments for a length, seeded.
        length: the one of the table.
        other_length: a prime that no plan has seen.
        tiny_length: one for quick tests.
        kind: ``"1d"`` where activations grow with the length or its square (tokens), ``"2d"`` where
            the length is a side of a picture, a map or a matrix of pairs.
        unit: what the length counts.
        option: name of the model's own way of saving memory; empty where it has none.
        set_option: switches it on, given a size, and gives the model to run.
        option_sizes: sizes worth trying.
    """

    name: str
    variant: str = ""
    build: Callable[[], nn.Module]
    build_longest: Callable[[], nn.Module] | None = None
    inputs: Callable[[int], Inputs]
    length: int
    other_length: int
    tiny_length: int
    kind: Literal["1d", "2d"]
    unit: str
    option: str = ""
    set_option: Callable[[nn.Module, int], nn.Module] | None = None
    option_sizes: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        """Name and variant, such as ``"GPT-2 (sdpa)"``."""
        return f"{self.name} ({self.variant})" if self.variant else self.name


def cases() -> tuple[Case, ...]:
    """All cases. Nothing is imported until one is built."""
    return (
        _evoformer(),
        _pairformer(),
        *(_gpt2(variant) for variant in ("eager", "sdpa")),
        *(_llama(variant) for variant in ("eager", "sdpa")),
        *(_esm2(variant) for variant in ("eager", "sdpa")),
        *(_hf_vit(variant, high=high) for high in (False, True) for variant in ("eager", "sdpa")),
        *(_timm_vit(variant) for variant in ("eager", "sdpa")),
        *(_unet(variant) for variant in ("eager", "sdpa")),
        *(_vae_decoder(variant) for variant in ("eager", "sdpa")),
        _wan(),
        _latte(),
        *(_x_transformers(variant) for variant in ("eager", "sdpa")),
        _msa_transformer(),
        _esmfold(),
    )


def select(*titles: str) -> tuple[Case, ...]:
    """The cases of these titles or names, in that order; of none: all.

    Raises:
        ProfileError: there is no such case.
    """
    if not titles:
        return cases()
    chosen: list[Case] = []
    for title in titles:
        found = [
            case for case in cases() if title.lower() in {case.title.lower(), case.name.lower()}
        ]
        if not found:
            known = ", ".join(case.title for case in cases())
            raise ProfileError(f"there is no case {title!r}; there are: {known}")
        chosen += found
    return tuple(chosen)


# ---------------------------------------------------------------------------------- one dimension


def _gpt2(variant: str) -> Case:
    def build(positions: int) -> nn.Module:
        transformers = _library("transformers", "hf")
        config = transformers.GPT2Config(
            vocab_size=512,
            n_positions=positions,
            n_embd=256,
            n_layer=2,
            n_head=8,
            attn_implementation=variant,
        )
        return _seeded(partial(transformers.GPT2Model, config))

    return Case(
        name="GPT-2",
        variant=variant,
        build=partial(build, 2048),
        build_longest=partial(build, _MOST_POSITIONS),
        inputs=lambda n: ((), {"input_ids": _tokens(n, 512), "use_cache": False}),
        length=1024,
        other_length=1031,
        tiny_length=32,
        kind="1d",
        unit="tokens",
    )


class Loss(nn.Module):
    """A language model's loss alone: ``input_ids[b, n] -> []``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        loss: Tensor = self.model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        return loss


def _llama(variant: str) -> Case:
    def build() -> nn.Module:
        transformers = _library("transformers", "hf")
        config = transformers.LlamaConfig(
            vocab_size=8192,
            hidden_size=256,
            intermediate_size=688,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=_MOST_POSITIONS,
            attn_implementation=variant,
        )
        return Loss(_seeded(partial(transformers.LlamaForCausalLM, config))).eval()

    return Case(
        name="Llama and loss",
        variant=variant,
        build=build,
        inputs=lambda n: ((_tokens(n, 8192),), {}),
        length=2048,
        other_length=2053,
        tiny_length=32,
        kind="1d",
        unit="tokens",
    )


def _esm2(variant: str) -> Case:
    def build() -> nn.Module:
        transformers = _library("transformers", "hf")
        config = transformers.EsmConfig(
            vocab_size=33,
            mask_token_id=32,
            pad_token_id=1,
            hidden_size=320,
            num_hidden_layers=2,
            num_attention_heads=20,
            intermediate_size=1280,
            max_position_embeddings=1026,
            position_embedding_type="rotary",
            token_dropout=True,
            attn_implementation=variant,
        )
        return _seeded(partial(transformers.EsmModel, config, add_pooling_layer=False))

    def inputs(n: int) -> Inputs:
        tokens = _tokens(n, 24, low=4)
        return (), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}

    return Case(
        name="ESM-2",
        variant=variant,
        build=build,
        inputs=inputs,
        length=1022,
        other_length=1033,
        tiny_length=32,
        kind="1d",
        unit="residues",
    )


def _x_transformers(variant: str) -> Case:
    def build() -> nn.Module:
        library = _library("x_transformers", "hf")
        flash = variant == "sdpa"
        make = partial(
            library.Encoder, dim=256, depth=2, heads=8, attn_flash=flash, rotary_pos_emb=True
        )
        return _seeded(make)

    return Case(
        name="x-transformers Encoder",
        variant=variant,
        build=build,
        inputs=lambda n: ((_normal(1, n, 256),), {}),
        length=1024,
        other_length=1031,
        tiny_length=32,
        kind="1d",
        unit="tokens",
    )


# --------------------------------------------------------------------------------------- pictures


def _hf_vit(variant: str, *, high: bool) -> Case:
    hidden, heads = (384, 6) if high else (768, 12)
    length, other_length = _high_resolution(variant) if high else (24, 23)

    def build() -> nn.Module:
        transformers = _library("transformers", "hf")
        config = transformers.ViTConfig(
            hidden_size=hidden,
            num_hidden_layers=2,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            image_size=224,
            patch_size=16,
            attn_implementation=variant,
        )
        return _seeded(partial(transformers.ViTModel, config, add_pooling_layer=False))

    def inputs(n: int) -> Inputs:
        picture = _normal(1, 3, 16 * n, 16 * n)
        return (), {"pixel_values": picture, "interpolate_pos_encoding": True}

    return Case(
        name="HF ViT, high resolution" if high else "HF ViT",
        variant=variant,
        build=build,
        inputs=inputs,
        length=length,
        other_length=other_length,
        tiny_length=3,
        kind="2d",
        unit="patches a side",
    )


def _high_resolution(variant: str) -> tuple[int, int]:
    """Patches a side at which the activations of this variant are large: one, and a prime."""
    return (48, 47) if variant == "eager" else (64, 61)


def _timm_vit(variant: str) -> Case:
    length, other_length = _high_resolution(variant)

    def build() -> nn.Module:
        timm = _timm()
        make = partial(
            timm.create_model,
            "vit_small_patch16_224",
            pretrained=False,
            depth=2,
            dynamic_img_size=True,
            num_classes=10,
        )
        model = _seeded(make)
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = variant == "sdpa"  # type: ignore[assignment]
        return model

    return Case(
        name="timm ViT, high resolution",
        variant=variant,
        build=build,
        inputs=lambda n: ((_normal(1, 3, 16 * n, 16 * n),), {}),
        length=length,
        other_length=other_length,
        tiny_length=3,
        kind="2d",
        unit="patches a side",
    )


def _unet(variant: str) -> Case:
    def build() -> nn.Module:
        diffusers = _library("diffusers", "hf")
        make = partial(
            diffusers.UNet2DConditionModel,
            sample_size=64,
            block_out_channels=(64, 128),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=64,
            attention_head_dim=4,
        )
        return _with_processor(_seeded(make), variant)

    def inputs(n: int) -> Inputs:
        return (_normal(1, 4, 4 * n, 4 * n), torch.tensor(7), _normal(1, 77, 64)), {
            "return_dict": False
        }

    return Case(
        name="UNet2DCondition",
        variant=variant,
        build=build,
        inputs=inputs,
        length=12 if variant == "eager" else 20,
        other_length=13 if variant == "eager" else 19,
        tiny_length=2,
        kind="2d",
        unit="fours of latents a side",
        option="set_attention_slice" if variant == "eager" else "",
        set_option=_slice_attention if variant == "eager" else None,
        option_sizes=(2, 1),
    )


def _slice_attention(model: Any, size: int) -> nn.Module:
    model.set_attention_slice(size)
    return cast(nn.Module, model)


class Decode(nn.Module):
    """An autoencoder's decoder: ``latents[b, 4, h, w] -> picture[b, 3, 8 h, 8 w]``."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        picture: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return picture


def _vae_decoder(variant: str) -> Case:
    def build() -> nn.Module:
        diffusers = _library("diffusers", "hf")
        make = partial(
            diffusers.AutoencoderKL,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(16, 32, 64, 64),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=8,
            sample_size=256,
        )
        vae: Any = _with_processor(_seeded(make), variant)
        vae.encoder = None  # the half that is not shown
        return Decode(vae).eval()

    return Case(
        name="VAE decoder",
        variant=variant,
        build=build,
        inputs=lambda n: ((_normal(1, 4, n, n),), {}),
        length=56,
        other_length=53,
        tiny_length=4,
        kind="2d",
        unit="latents a side",
        option="enable_tiling",
        set_option=_tile,
        option_sizes=(32, 16),
    )


def _tile(model: Any, size: int) -> nn.Module:
    """Decodes tiles of ``size`` latents a side and blends them: not the same picture."""
    model.vae.enable_tiling()
    model.vae.tile_latent_min_size = size
    model.vae.tile_sample_min_size = 8 * size
    return cast(nn.Module, model)


# ----------------------------------------------------------------------------------------- videos


def _wan() -> Case:
    def build() -> nn.Module:
        diffusers = _library("diffusers", "hf")
        make = partial(
            diffusers.WanTransformer3DModel,
            num_attention_heads=4,
            attention_head_dim=64,
            in_channels=16,
            out_channels=16,
            text_dim=64,
            freq_dim=64,
            ffn_dim=1024,
            num_layers=2,
        )
        return _seeded(make)

    def inputs(n: int) -> Inputs:
        latents = _normal(1, 16, 5, 2 * n, 2 * n)
        return (latents, torch.tensor([7]), _normal(1, 64, 64)), {"return_dict": False}

    return Case(
        name="Wan",
        variant="sdpa",
        build=build,
        inputs=inputs,
        length=32,
        other_length=31,
        tiny_length=2,
        kind="2d",
        unit="patches a side",
    )


def _latte() -> Case:
    def build() -> nn.Module:
        diffusers = _library("diffusers", "hf")
        make = partial(
            diffusers.LatteTransformer3DModel,
            num_attention_heads=4,
            attention_head_dim=32,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=128,
            sample_size=64,
            patch_size=2,
            activation_fn="gelu-approximate",
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=64,
            video_length=8,
            attention_bias=True,
        )
        return _seeded(make)

    def inputs(n: int) -> Inputs:
        latents = _normal(1, 4, 8, 2 * n, 2 * n)
        return (latents, torch.tensor([7]), _normal(1, 16, 64)), {"return_dict": False}

    return Case(
        name="Latte",
        variant="sdpa",
        build=build,
        inputs=inputs,
        length=24,
        other_length=23,
        tiny_length=2,
        kind="2d",
        unit="patches a side",
        option="set_chunk_feed_forward",
        set_option=_chunk_feed_forward,
        option_sizes=(4, 1),
    )


def _chunk_feed_forward(model: Any, size: int) -> nn.Module:
    for block in (*model.transformer_blocks, *model.temporal_transformer_blocks):
        block.set_chunk_feed_forward(size, dim=1)
    return cast(nn.Module, model)


# --------------------------------------------------------------------------------------- proteins


def _msa_transformer() -> Case:
    def build(positions: int) -> nn.Module:
        esm = _library("esm", "hf", package="fair-esm")
        module = importlib.import_module("esm.model.msa_transformer")
        alphabet = esm.data.Alphabet.from_architecture("msa_transformer")
        sizes = Namespace(
            embed_dim=192,
            layers=2,
            ffn_embed_dim=768,
            attention_heads=12,
            dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            max_tokens=2**40,
            max_tokens_per_msa=2**40,  # its own chunking is off
            max_positions=positions,
            embed_positions_msa=True,
            embed_positions_msa_dim=192,
        )
        return _seeded(partial(module.MSATransformer, sizes, alphabet))

    return Case(
        name="MSA Transformer",
        build=partial(build, 1024),
        build_longest=partial(build, _MOST_POSITIONS),
        inputs=lambda n: ((_tokens(n, 24, low=4, rows=(1, 128)),), {}),
        length=128,
        other_length=127,
        tiny_length=12,
        kind="2d",
        unit="residues (of 128 sequences)",
        option="max_tokens_per_msa",
        set_option=_limit_tokens,
        option_sizes=(2048, 256),
    )


def _limit_tokens(model: Any, size: int) -> nn.Module:
    model.max_tokens_per_msa_(size)
    return cast(nn.Module, model)


def _esmfold() -> Case:
    def build() -> nn.Module:
        esmfold = _library("transformers.models.esm.modeling_esmfold", "hf", package="transformers")
        config = importlib.import_module("transformers.models.esm.configuration_esm")
        trunk = config.TrunkConfig(
            sequence_state_dim=256,
            pairwise_state_dim=128,
            sequence_head_width=32,
            pairwise_head_width=32,
        )
        return _seeded(partial(esmfold.EsmFoldTriangularSelfAttentionBlock, trunk))

    def inputs(n: int) -> Inputs:
        return (_normal(1, n, 256), _normal(1, n, n, 128)), {"mask": torch.ones(1, n)}

    return Case(
        name="EsmFold trunk block",
        build=build,
        inputs=inputs,
        length=128,
        other_length=127,
        tiny_length=12,
        kind="2d",
        unit="residues",
        option="set_chunk_size",
        set_option=FoldInChunks,
        option_sizes=(64, 16, 4, 1),
    )


class FoldInChunks(nn.Module):
    """A trunk block with the chunk size that ``set_chunk_size`` of the trunk gives its blocks."""

    def __init__(self, block: nn.Module, chunk_size: int) -> None:
        super().__init__()
        self.block = block
        self.chunk_size = chunk_size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, chunk_size=self.chunk_size, **kwargs)


def _evoformer() -> Case:
    def build() -> nn.Module:
        from hairpin.bench.evoformer import EvoformerBlock, Size, randomise

        return _seeded(lambda: randomise(EvoformerBlock(Size())))

    return Case(
        name="Evoformer block",
        build=build,
        inputs=lambda n: ((_normal(32, n, 256), _normal(n, n, 128)), {}),
        length=128,
        other_length=127,
        tiny_length=12,
        kind="2d",
        unit="residues (of 32 sequences)",
    )


def _pairformer() -> Case:
    def build() -> nn.Module:
        from hairpin.bench.evoformer import randomise
        from hairpin.bench.pairformer import PairformerBlock, Size

        return _seeded(lambda: randomise(PairformerBlock(Size())))

    return Case(
        name="Pairformer block",
        build=build,
        inputs=lambda n: ((_normal(n, 384), _normal(n, n, 128)), {}),
        length=128,
        other_length=127,
        tiny_length=12,
        kind="2d",
        unit="residues",
    )


# ---------------------------------------------------------------------------------------- building


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """The model in eval mode, its weights drawn from a seed that touches no other random state."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return make().eval()


def _with_processor(model: Any, variant: str) -> nn.Module:
    """diffusers' attention as two products and a softmax, or as one call."""
    processors = importlib.import_module("diffusers.models.attention_processor")
    eager, fused = processors.AttnProcessor, processors.AttnProcessor2_0
    model.set_attn_processor(fused() if variant == "sdpa" else eager())
    return cast(nn.Module, model)


def _tokens(n: int, vocabulary: int, *, low: int = 0, rows: tuple[int, ...] = (1,)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(low, vocabulary, (*rows, n), generator=generator)


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _library(name: str, extra: str, *, package: str = "") -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        own = {"timm": "--no-deps timm", "x_transformers": "x-transformers"}  # in no extra
        what = own.get(package or name, f"'hairpin[{extra}]'")
        raise MissingExtraError(
            f"this case needs {package or name}, which is not installed: pip install {what}"
        ) from error


def _timm() -> Any:
    """timm, also where torchvision, which its part for training data imports, is absent."""
    if "timm" in sys.modules or find_spec("timm") is None or find_spec("torchvision") is not None:
        return _library("timm", "hf")
    with placeholders("torchvision"):
        return _library("timm", "hf")
