"""Where the vision transformer computes along its stream of patches.

`ATTENDS`: a pattern names the dims of a module's first argument and of its output; the dims in
[brackets] are those it computes along. `ROUTED`: the modules without parameters that attend, which
a split of the stream computes across ranks. `BLOCKS`: the list of blocks that all take the stream
`[b, s, c]` first, class token in front; the stream is formed before the first of them and leaves
after the last.
"""

ATTENDS: dict[str, str] = {"blocks.*.attention": "b [s] c"}
ROUTED: tuple[str, ...] = ("blocks.*.attention.attend",)
BLOCKS = "blocks"
