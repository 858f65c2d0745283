"""Which submodule of the axial transformer computes along which of its three long dims."""

ATTENDS: dict[str, str] = {
    "blocks.*.level": "b [z] y x c",
    "blocks.*.latitude": "b z [y] x c",
    "blocks.*.longitude": "b z y [x] c",
    "head": "b z y x c -> b z y x v",
}
