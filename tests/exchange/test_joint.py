"""A split stream and a whole one attend jointly: values and gradients against one process."""

import itertools

import pytest
import torch

from exchange.cases import WIDE, line
from hairpin.comm.mesh import Mesh
from hairpin.exchange.joint import joint_attention
from hairpin.exchange.order import Order
from hairpin.exchange.split import SequenceSplit
from hairpin.run.launch import launch
from marks import slow

LENGTHS = [(13, 3), (2, 5), (9, 0)]
NAMES = ("q", "k", "v", "whole q", "whole k", "whole v")


def tensors(length, whole, heads, groups):
    made = torch.Generator().manual_seed(length + 7 * whole)
    shapes = [(2, heads, length, 5), *[(2, groups, length, 5)] * 2]
    shapes += [(2, heads, whole, 5), *[(2, groups, whole, 5)] * 2]
    shapes += [(2, heads, length, 5), (2, heads, whole, 5)]
    return [torch.randn(s, generator=made, dtype=WIDE) for s in shapes]


def truth(length, whole, heads, groups):
    """Both streams as one, scores written out."""
    *given, grad, whole_grad = tensors(length, whole, heads, groups)
    given = [x.requires_grad_() for x in given]
    q, k, v = (torch.cat(pair, 2) for pair in zip(given[:3], given[3:], strict=True))
    k, v = (x.repeat_interleave(heads // groups, 1) for x in (k, v))
    out = (q @ k.transpose(-1, -2) / 5**0.5).softmax(-1) @ v
    grads = torch.autograd.grad(out, given, torch.cat([grad, whole_grad], 2))
    return out.detach(), dict(zip(NAMES, grads, strict=True))


def faults(heads, key_heads):
    mesh, found = line(), []
    ways = [{"schedule": s} for s in ("ring", "all_gather")]
    if mesh.world > 1:
        ways += [{"heads": mesh.world}]
    if mesh.world == 4:
        ways += [{"schedule": s, "inner": 2} for s in ("double_ring", "hierarchical")]
        ways += [{"heads": 2, "heads_inside": inside} for inside in (True, False)]
        ways += [{"heads": 2, "schedule": "all_gather"}]
    for (length, whole), groups, way in itertools.product(LENGTHS, key_heads, ways):
        split = SequenceSplit(mesh, "sp", Order("contiguous", length), **way)
        out, want = truth(length, whole, heads, groups)
        *given, grad, whole_grad = tensors(length, whole, heads, groups)
        held = split.positions
        mine = [x[:, :, held].clone().requires_grad_() for x in given[:3]]
        theirs = [x.clone().requires_grad_() for x in given[3:]]
        got, got_whole = joint_attention(tuple(mine), tuple(theirs), split)
        # each rank's term of the whole output's cotangent; they add up to it
        share = whole_grad * (mesh.global_rank + 1) / (mesh.world * (mesh.world + 1) / 2)
        torch.autograd.backward([got, got_whole], [grad[:, :, held], share])
        terms = [x.grad.clone() for x in theirs]
        for term in terms:
            if mesh.world > 1:
                torch.distributed.all_reduce(term)
        parts = dict(zip(NAMES, [*(x.grad for x in mine), *terms], strict=True))
        wanted = {n: g[:, :, held] if n in NAMES[:3] else g for n, g in want.items()}
        parts |= {"out": got, "whole out": got_whole}
        wanted |= {"out": out[:, :, held], "whole out": out[:, :, length:]}
        found += [
            f"{length} + {whole}, {groups} groups, {way}: {name}"
            for name, x in parts.items()
            if not torch.allclose(x, wanted[name], rtol=0, atol=1e-12)
        ]
    return found


@pytest.mark.parametrize("world", [1, 2, 3, slow(4)])
def test_two_streams_give_what_one_process_gives(world):
    for found in launch(faults, world, 4, (4, 2)):
        assert found == []


@pytest.mark.parametrize(("heads", "groups"), [(6, (2, 3)), (3, (1,))])
def test_heads_that_do_not_divide_the_places(heads, groups):
    """Key heads that several places use, and a place without a head."""
    for found in launch(faults, 4, heads, groups):
        assert found == []


def test_streams_that_do_not_fit_are_refused():
    split = SequenceSplit(Mesh(sp=1), "sp", Order("contiguous", 4))
    x, other = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 3, 6)
    with pytest.raises(ValueError, match="share all but the positions"):
        joint_attention((x, x, x), (other, other, other), split)
    with pytest.raises(ValueError, match="holds 4 of 4 positions"):
        joint_attention((other, x, x), (x, x, x), split)
    published = SequenceSplit(Mesh(sp=2), "sp", Order("contiguous", 8), schedule="rsa")
    with pytest.raises(ValueError, match="merges states, which schedule 'rsa' does not have"):
        joint_attention((x, x, x), (x, x, x), published)
