"""Which submodule of AlphaFold computes along which dim.

Dims: s sequences, r residues of the MSA; i, j residues of the pair representation; c channels,
h heads. A pattern names the dims of a module's first argument and of its output; those in
[brackets] are the ones it computes along, so they must be whole there. ``args`` gives patterns of
other arguments that carry a dim; an argument that is not named is used whole, which is where a plan
has to gather: the ``bias`` that `PairBias` makes, ``b`` of a triangle product, and the right
operand of the outer product mean.
"""

from collections.abc import Mapping

Seam = str | Mapping[str, object]

_MSA: dict[str, Seam] = {
    "msa_row_attention_with_pair_bias.query_norm": "s r c",
    "msa_row_attention_with_pair_bias.pair_bias": {"stream": "i j c", "out": "h i j"},
    "msa_row_attention_with_pair_bias.attention": {"stream": "s [r] c", "args": {"mask": "s r"}},
    "msa_transition": "s r c",
    "outer_product_mean.norm": "s r c",
    "outer_product_mean.left": {
        "stream": "s r c",
        "args": {"mask": "s r"},
        "out": ("s r c", "s r"),
    },
    "outer_product_mean.right": {
        "stream": "s r c",
        "args": {"mask": "s r"},
        "out": ("s r c", "s r"),
    },
    "outer_product_mean.output": "i j c",
}
_TRIANGLES: dict[str, Seam] = {
    "triangle_multiplication_outgoing.operands": {
        "stream": "i j c",
        "args": {"mask": "i j"},
        "out": ("i j c", "i j c"),
    },
    "triangle_multiplication_outgoing.product": "i [j] c",
    "triangle_multiplication_outgoing.output_projection": "i j c",
    "triangle_multiplication_incoming.operands": {
        "stream": "i j c",
        "args": {"mask": "i j"},
        "out": ("i j c", "i j c"),
    },
    "triangle_multiplication_incoming.product": "[i] j c",
    "triangle_multiplication_incoming.output_projection": "i j c",
    "triangle_attention_starting_node.pair_bias": {"stream": "i j c", "out": "h i j"},
    "triangle_attention_starting_node.attention": {
        "stream": "i [j] c",
        "args": {"mask": "i j"},
    },
    "triangle_attention_ending_node.pair_bias": {"stream": "j i c", "out": "h j i"},
    "triangle_attention_ending_node.attention": {
        "stream": "j [i] c",
        "args": {"mask": "j i"},
    },
    "pair_transition": "i j c",
}

_COLUMN: Seam = {"stream": "[s] r c", "args": {"mask": "s r"}}


def _under(path: str, seams: Mapping[str, Seam]) -> dict[str, Seam]:
    return {f"{path}.{name}": seam for name, seam in seams.items()}


def _stack(path: str, column: str) -> dict[str, Seam]:
    pair = _under(f"{path}.pair_stack", _TRIANGLES)
    return {**_under(path, {**_MSA, column: _COLUMN}), **pair}


ATTENDS: dict[str, Seam] = {
    **_stack("evoformer.blocks.*", "msa_column_attention"),
    **_stack("extra_msa_stack.blocks.*", "msa_column_global_attention"),
}

# A model with templates has these too.
TEMPLATE_ATTENDS: dict[str, Seam] = _under(
    "template_embedder.template_pair_stack.blocks.*", _TRIANGLES
)
