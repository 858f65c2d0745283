"""Where the language model computes along the sequence.

`ATTENDS`: a pattern names the dims of a module's first argument and of its output; the dims in
[brackets] are those it computes along. `ROUTED`: the modules without parameters that attend, which
a split of the sequence computes across ranks.
"""

ATTENDS: dict[str, str] = {"blocks.*.attention": "b [s] c"}
ROUTED: tuple[str, ...] = ("blocks.*.attention.attend",)
