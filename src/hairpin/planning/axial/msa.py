"""One block of the Evoformer, split (Jumper et al. 2021, Suppl. Algs 6 and 18).

``m[s, r, c]`` is held along s for row attention and along r for all that follows. In the monomer's
order it arrives along s: the turn back is started before the pair updates and awaited after them.
In the multimer's order, where the outer product comes first, it arrives along r.

``z[i, j, c]`` arrives along j, as the last block's transition left it. Its bias is made there, and
it turns to i behind row and column attention. On a grid it stays along j until the outer product
is added, and then turns half the way, to where triangle products run.
"""

from functools import partial
from typing import Any

from torch import Tensor

from hairpin.comm.pending import Pending
from hairpin.planning.axial.attention import attend, crossing
from hairpin.planning.axial.pair import pair_stack
from hairpin.planning.axial.pieces import by_rows, turned_rows
from hairpin.planning.axial.way import Way, advance

Module = Any  # one of the model's, which this floor does not import
Operand = tuple[Tensor, Tensor]  # ``[s, r, c]`` and its mask ``[s, r]``


def arrives_along(block: Module) -> str:
    """How ``m`` is held where a block begins."""
    return "r" if block.outer_first else "s"


def evoformer_block(
    block: Module,
    m: Tensor,
    z: Tensor,
    masks: tuple[Tensor, Tensor],
    way: Way,
    *,
    leaves: str,
) -> tuple[Tensor, Tensor]:
    """``m[s, r, c], z[i, j, c]`` to the same.

    Args:
        m: held as :func:`arrives_along` says; z: held along j.
        masks: of the MSA ``[s, r]`` and of pairs ``[i, j]``, whole.
        leaves: how the new ``m`` is to be held.
    """
    order = _outer_first if block.outer_first else _outer_last
    return order(block, m, z, masks, way, leaves=leaves)


def _outer_last(
    block: Module,
    m: Tensor,
    z: Tensor,
    masks: tuple[Tensor, Tensor],
    way: Way,
    *,
    leaves: str,
) -> tuple[Tensor, Tensor]:
    """The monomer's order."""
    msa_mask, pair_mask = masks
    bias = _row_bias(block, z, way)
    turning = way.turn(z, "i j c", "j", way.updated)
    m = _columns(block, _rows(block, m, bias, msa_mask, way), msa_mask, way)
    del bias
    mean = _outer_product_mean(block.outer_product_mean, m, msa_mask, way, way.updated)
    back = way.turn(m, "s r c", "r", leaves)
    z = turning.wait()
    del turning
    z = z + mean.wait()
    del mean
    between = partial(advance, back)
    z, _ = pair_stack(block.pair_stack, z, pair_mask, way, way.updated, between)
    return back.wait(), z


def _outer_first(
    block: Module,
    m: Tensor,
    z: Tensor,
    masks: tuple[Tensor, Tensor],
    way: Way,
    *,
    leaves: str,
) -> tuple[Tensor, Tensor]:
    """The multimer's order: pairs learn first, and their bias is of what they have learned."""
    msa_mask, pair_mask = masks
    mean = _outer_product_mean(block.outer_product_mean, m, msa_mask, way, "j")
    by_sequence = way.turn(m, "s r c", "r", "s")
    z = z + mean.wait()
    del mean
    advance(by_sequence)
    bias = _row_bias(block, z, way)
    turning = way.turn(z, "i j c", "j", way.multiplied)
    m = by_sequence.wait()
    del by_sequence
    m = _columns(block, _rows(block, m, bias, msa_mask, way), msa_mask, way)
    del bias
    back = way.turn(m, "s r c", "r", leaves)
    z, between = turning.wait(), partial(advance, back)
    del turning
    z, _ = pair_stack(block.pair_stack, z, pair_mask, way, way.multiplied, between)
    return back.wait(), z


def _row_bias(block: Module, z: Tensor, way: Way) -> Pending:
    return crossing(block.msa_row_attention_with_pair_bias.pair_bias(z), "k", way)


def _rows(block: Module, m: Tensor, bias: Pending, mask: Tensor, way: Way) -> Tensor:
    """Suppl. Alg. 7, ``m`` held along s; then it turns to r."""
    row, own = block.msa_row_attention_with_pair_bias, mask[way.mine("s")]

    def rows(some: slice) -> Tensor:
        update = attend(row.attention, row.query_norm(m[some]), own[some], bias, way)
        return block.msa_dropout(update, m[some])  # type: ignore[no-any-return]

    return turned_rows(rows, len(m), ("s r c", "s", "r"), way)


def _columns(block: Module, m: Tensor, mask: Tensor, way: Way) -> Tensor:
    """Suppl. Algs 8 or 19, and 9, ``m`` held along r."""
    column = block.msa_column_global_attention if block.extra else block.msa_column_attention
    own, m = mask[:, way.mine("r")], m.transpose(0, 1)

    def rows(some: slice) -> Tensor:
        part = m[some].transpose(0, 1)
        part = part + column(part, own[:, some])
        return (part + block.msa_transition(part)).transpose(0, 1)  # type: ignore[no-any-return]

    return by_rows(rows, len(m), way).transpose(0, 1)


def _outer_product_mean(module: Module, m: Tensor, mask: Tensor, way: Way, held: str) -> Pending:
    """Suppl. Alg. 10, ``m`` held along r: start the update ``[i, j, c_z]``, held along ``held``.

    The operand of the other dim is gathered, or its parts pass by.
    """
    mine = mask[:, way.mine("r")]
    sides = [module.left, module.right]
    near, far = sides if held == "i" else sides[::-1]
    crosses, _ = far(module.norm(m), mine)
    if way.passing == "gather" or way.degree == 1:
        coming = way.whole(crosses, "s r c", "r")

        def gathered() -> Tensor:
            own, _ = near(module.norm(m), mine)
            return _update(module, (own, mine), (coming.wait(), mask), way, held)

        return Pending(gathered)

    def update(rows: slice, part: Tensor, own: Tensor, own_mask: Tensor, mask: Tensor) -> Tensor:
        pair = [(own, own_mask), (part, mask[:, rows])]
        return module.update(*(pair if held == "i" else pair[::-1]))  # type: ignore[no-any-return]

    def passed() -> Tensor:
        return way.as_it_passes(
            update,
            crosses,
            ("s r c", "r"),
            near=(*near(module.norm(m), mine), mask),
            dim=1 if held == "i" else 0,
            parameters=tuple(module.output.parameters()),
        )

    return Pending(passed)


def _update(module: Module, own: Operand, other: Operand, way: Way, held: str) -> Tensor:
    """Lines 3 and 4 of Suppl. Alg. 10, own residues first or, held along j, second."""
    a, mask = own

    def rows(some: slice) -> Tensor:
        mine = a[:, some], mask[:, some]
        if held == "i":
            return module.update(mine, other)  # type: ignore[no-any-return]
        return module.update(other, mine).transpose(0, 1)  # type: ignore[no-any-return]

    update = by_rows(rows, a.shape[1], way)
    return update if held == "i" else update.transpose(0, 1)
