"""Seams of fair-esm's ``MSATransformer`` (Rao et al. 2021), dims r rows (sequences), c columns.

Its row attention is tied: the scores are summed over all rows, so it computes along r *and* c and
is held whole (or split along the batch, with ``free_dims=("b",)``). Column attention and the
feed-forward layers run split along c. Attention maps of the columns stay local: a call with
``need_head_weights=True`` is refused when planned.
"""

from typing import Any

ATTENDS: dict[str, Any] = {
    "": {"tokens": "b r c"},
    "layers.*.row_self_attention": {
        "stream": "[r] [c] b d",
        "args": {"self_attn_padding_mask": "b r c"},
        "out": ("r c b d", "n b c k"),
    },
    "layers.*.column_self_attention": {
        "stream": "[r] c b d",
        "args": {"self_attn_padding_mask": "b r c"},
        "out": ("r c b d", None),
    },
    "layers.*.feed_forward_layer": "r c b d",
    "emb_layer_norm_after": "r c b d",
    "lm_head": "b r c d -> b r c v",
}
