"""Which submodule of the video transformer computes along which dim.

A pattern names the dims of a module's first argument and of its output; the dims in [brackets]
are those it computes along, so they must be whole there.
"""

ATTENDS: dict[str, str] = {
    "blocks.*.spatial": "b t [s] c",
    "blocks.*.temporal": "b [t] s c",
    "head": "b t s c -> b t s p",
}
