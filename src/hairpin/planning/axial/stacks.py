"""Finding the stacks of a folding model, by the parts that their blocks have."""

from typing import Any

from torch import nn

_EVOFORMER = ("outer_product_mean", "msa_transition", "pair_stack")
_PAIR = ("triangle_multiplication_outgoing", "triangle_attention_ending_node", "pair_transition")


def evoformer_stacks(model: nn.Module) -> list[Any]:
    """Modules whose ``blocks`` update an MSA and pairs."""
    return [module for module in model.modules() if _all_have(module, _EVOFORMER)]


def pair_stacks(model: nn.Module) -> list[Any]:
    """Modules whose ``blocks`` update pairs alone."""
    return [module for module in model.modules() if _all_have(module, _PAIR)]


def template_attentions(model: nn.Module) -> list[tuple[Any, Any]]:
    """A stack of templates, and the attention of every pair to them, which alone reads it.

    A model for complexes has none: it adds its templates.
    """
    stacks = pair_stacks(model)
    pairs = [
        (getattr(module, "template_pair_stack", None), getattr(module, "attention", None))
        for module in model.modules()
    ]
    return [(stack, attention) for stack, attention in pairs if attention and stack in stacks]


def extra_msas(model: nn.Module) -> list[tuple[Any, Any]]:
    """What embeds an extra MSA, row by row, and the stack that alone reads it."""
    pairs = [
        (getattr(module, "extra_msa_embedder", None), getattr(module, "extra_msa_stack", None))
        for module in model.modules()
    ]
    stacks = evoformer_stacks(model)
    return [(embedder, stack) for embedder, stack in pairs if embedder and stack in stacks]


def _all_have(module: nn.Module, names: tuple[str, ...]) -> bool:
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    return all(isinstance(getattr(b, name, None), nn.Module) for b in blocks for name in names)
