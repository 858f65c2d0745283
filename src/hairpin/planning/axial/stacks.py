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


def template_attentions(model: nn.Module) -> list[Any]:
    """Attention of every pair to its templates alone; a model for complexes has none."""
    embedders = [module for module in model.modules() if hasattr(module, "template_pair_stack")]
    found = [getattr(embedder, "attention", None) for embedder in embedders]
    return [attention for attention in found if isinstance(attention, nn.Module)]


def _all_have(module: nn.Module, names: tuple[str, ...]) -> bool:
    blocks = getattr(module, "blocks", None)
    if not isinstance(blocks, nn.ModuleList) or not len(blocks):
        return False
    return all(isinstance(getattr(b, name, None), nn.Module) for b in blocks for name in names)
