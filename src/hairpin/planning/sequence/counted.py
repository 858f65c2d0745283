"""Refusing what a model counts over its whole input, and on a part would count otherwise.

Running it on a few positions does not always find these: they change at one length, or with certain
tokens. Both are known from transformers.
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from hairpin.errors import SequenceError
from hairpin.planning.sequence.plan import SequencePlan

_BY_LENGTH = ("dynamic", "longrope")


def refuse_counted(model: nn.Module, plan: SequencePlan) -> None:
    """Refuse a module whose numbers depend on the length, or on counted tokens, of its own part.

    Raises:
        SequenceError: naming the module and what to do instead.
    """
    if plan.split.mesh.size(plan.split.axis) == 1:
        return
    longest = max(plan.mask.documents or (plan.length,))
    for path, module in model.named_modules():
        _refuse_rope(path, module, longest)
        _refuse_token_dropout(path, module)


def _refuse_rope(path: str, module: Any, longest: int) -> None:
    """Frequencies that transformers chooses by the largest position that it is given."""
    types = getattr(module, "rope_type", None)
    for layers, rope in types.items() if isinstance(types, Mapping) else [(None, types)]:
        if not isinstance(rope, str) or not any(name in rope for name in _BY_LENGTH):
            continue
        usual = _usual_length(module, rope, layers)
        if usual is None or longest > usual:
            raise SequenceError(
                f"module '{path}' has rope_type={rope!r}, whose frequencies depend on the largest "
                f"position of this rank's part; they differ between ranks where {longest} "
                f"positions are more than the original {usual}. Give the model a fixed scaling "
                "(rope_type 'yarn' or 'linear'), or a shorter sequence"
            )


def _usual_length(module: Any, rope: str, layers: str | None) -> int | None:
    """Up to which length the frequencies are the same; None if not known."""
    if "longrope" not in rope:
        length = getattr(module, "original_max_seq_len", None)
    else:
        config = getattr(module, "config", None)
        settings = getattr(config, "rope_parameters", None) or {}
        settings = settings if layers is None else settings.get(layers, {})
        name = "original_max_position_embeddings"
        length = settings.get(name, getattr(config, name, None))
    return None if length is None else int(length)


def _refuse_token_dropout(path: str, module: Any) -> None:
    """ESM's embedding, which scales by the share of mask tokens."""
    if getattr(module, "token_dropout", None) is True and hasattr(module, "mask_token_id"):
        raise SequenceError(
            f"module '{path}' has token_dropout: it scales its embeddings by the share of mask "
            "tokens in what it is given, which is another one on each rank. Embed the whole "
            f"sequence first (embeds = model.{path}(input_ids=..., attention_mask=...)), set "
            f"model.{path}.token_dropout = False, and give plan.shard inputs_embeds=embeds"
        )
