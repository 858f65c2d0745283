"""Seams of diffusers' ``LatteTransformer3DModel`` (Ma et al. 2024, arXiv 2401.03048).

Frames t and patches s are merged with the batch b in turn. The time step and the text are repeated
once per frame for the spatial blocks and once per patch for the temporal ones.
"""

from typing import Any

ATTENDS: dict[str, Any] = {
    "": {"hidden_states": "b i t h w"},
    "transformer_blocks.*": {
        "stream": "(b t) [s] c",
        "args": {"encoder_hidden_states": "(b t) l c", "timestep": "(b t) e"},
    },
    "temporal_transformer_blocks.*": {
        "stream": "(b s) [t] c",
        "args": {"timestep": "(b s) e"},
    },
    "proj_out": "(b t) s c -> (b t) s o",
    "temp_pos_embed": "1 t c",
}
