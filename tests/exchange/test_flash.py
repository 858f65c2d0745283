"""How the package flash-attn is called: a stand-in with its signatures computes in torch."""

import math
import sys
from importlib import metadata
from types import ModuleType

import pytest
import torch

from hairpin.exchange import block, flash
from hairpin.exchange.mask import Mask
from hairpin.exchange.port import Block
from hairpin.exchange.tiles import cut

BRAIN = torch.bfloat16


def scores_of(q, k, *, scale, causal, left, right):
    """Logits ``[b, h, q, k]`` in float32 as the package masks them: last row at the last key."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    logits = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
    shift = k.shape[1] - q.shape[1]
    own = torch.arange(q.shape[1])[:, None] + shift
    key = torch.arange(k.shape[1])
    hidden = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
    if left >= 0:
        hidden |= key < own - left
    if causal or right >= 0:
        hidden |= key > own + (0 if causal else right)
    return logits.masked_fill(hidden, -math.inf)


def forward(
    q, k, v, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, alibi_slopes, return_softmax,
):  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes, return_softmax) == (0.0, 0.0, None, False)
    assert all(x.stride(-1) == 1 for x in (q, k, v))
    logits = scores_of(
        q, k, scale=softmax_scale, causal=causal, left=window_size_left, right=window_size_right
    )
    lse = logits.logsumexp(-1)
    weights = (logits - torch.nan_to_num(lse, neginf=0.0).unsqueeze(-1)).exp()
    v = v.repeat_interleave(q.shape[2] // v.shape[2], 2).float()
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v).to(q.dtype)
    lse = lse.masked_fill(lse.isneginf(), math.inf)  # as the package says that a row saw nothing
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal,
    window_size_left, window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
):  # fmt: skip
    assert (dropout_p, softcap, alibi_slopes, rng_state) == (0.0, 0.0, None, None)
    assert dout.dtype == out.dtype == q.dtype
    assert softmax_lse.dtype == torch.float32
    assert deterministic is False
    logits = scores_of(
        q, k, scale=softmax_scale, causal=causal, left=window_size_left, right=window_size_right
    )
    weights = (logits - softmax_lse.unsqueeze(-1)).exp()
    times = q.shape[2] // k.shape[2]
    whole_k, whole_v = (x.repeat_interleave(times, 2).float() for x in (k, v))
    grad = dout.float()
    delta = (grad * out.float()).sum(-1).transpose(1, 2).unsqueeze(-1)
    of_scores = weights * (torch.einsum("bqhd,bkhd->bhqk", grad, whole_v) - delta) * softmax_scale
    of_v = torch.einsum("bhqk,bqhd->bkhd", weights, grad)
    of_k = torch.einsum("bhqk,bqhd->bkhd", of_scores, q.float())
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", of_scores, whole_k))
    for into, x in ((dk, of_k), (dv, of_v)):
        into.copy_(x.unflatten(2, (-1, times)).sum(3))
    return torch.empty(0)


@pytest.fixture
def _package(monkeypatch):
    """The stand-in, in the place of version 2.8.3."""
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = forward, backward
    package = ModuleType("flash_attn")
    package.__spec__ = object()
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.3")
    flash.why_not.cache_clear()
    yield
    flash.why_not.cache_clear()


def require_alike(call: Block, *, groups: int = 4, rows: int = 24, keys: int = 24) -> None:
    """Raise unless a block by the package is that of plain operations, and its gradients too.

    They are those by an output and a log-sum-exp that other keys have taken part in.
    """
    shapes = [(2, 4, rows, 16), (2, groups, keys, 16), (2, groups, keys, 16), (2, 4, rows, 16)]
    q, k, v, grad = (torch.randn(s).to(BRAIN) for s in shapes)
    assert flash.takes(q, k, call)
    exact = tuple(x.double() for x in (q, k, v))
    got, want = flash.forward((q, k, v), call), block._plain(exact, call)
    seen = want[1].isfinite()
    assert torch.allclose(got[0].double(), want[0], atol=2e-2)
    assert torch.allclose(got[1].double()[seen], want[1][seen], atol=1e-2)
    assert got[1][~seen].isposinf().all()
    lse = want[1].masked_fill(~seen, math.inf) + 0.5
    state = want[0] * 0.7, lse
    grads = flash.backward(grad, (q, k, v), (state[0].float(), lse.float()), call)
    wants = block._plain_backward(grad.double(), exact, state, call)
    assert grads[3] is None
    for x, y in zip(grads[:3], wants[:3], strict=True):
        assert x.shape == y.shape
        assert torch.allclose(x.double(), y, atol=3e-2 * float(y.abs().max()))


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_whole_and_causal_tiles(groups):
    require_alike(Block(0.25), groups=groups, keys=31)
    require_alike(Block(0.3, causal=True), groups=groups)


@pytest.mark.usefixtures("_package")
@pytest.mark.parametrize("mask", [Mask(causal=True, window=7), Mask(window=5), Mask(window=300)])
def test_tiles_of_windows(mask):
    """Every masked tile of a window is one, but for those that the window's ends cut."""
    whole = torch.arange(300)
    taken = 0
    for tile in cut(whole[40:260], whole, mask, 300):
        window = block.window_of(tile)
        if window is None:
            assert tile.kind != "masked" or tile.rows.stop == 220
            continue
        rows, keys = tile.rows.stop - tile.rows.start, tile.keys.stop - tile.keys.start
        added = block.masked(tile, torch.float64, torch.device("cpu"))
        require_alike(Block(0.25, added=added, window=window), rows=rows, keys=keys)
        taken += 1
    assert taken or mask.window == 300


@pytest.mark.usefixtures("_package")
def test_what_it_does_not_take():
    q = torch.empty(1, 4, 8, 16, dtype=BRAIN)
    added = torch.zeros(8, 8)
    assert flash.takes(q, q, Block(0.25))
    for call in (
        Block(0.25, added=added),
        Block(0.25, added=added, learns=True),
        Block(0.25, dropout=0.1),
        Block(0.25, added=added, window=(3, 1)),
        Block(0.25, causal=True, added=added),
    ):
        assert not flash.takes(q, q, call)
    assert not flash.takes(q, q[:, :, :4], Block(0.25, causal=True))
    for other in (q.float(), q[..., :12], torch.empty(1, 1, 1, 264, dtype=BRAIN)):
        assert not flash.takes(other, other, Block(0.25))


@pytest.mark.usefixtures("_package")
def test_why_it_is_not_used(monkeypatch):
    assert flash.why_not() is None
    monkeypatch.setattr(metadata, "version", lambda name: "2.6.3")
    flash.why_not.cache_clear()
    assert "version 2.6.3 is too old" in flash.why_not()
    assert not flash.takes(*[torch.empty(1, 1, 8, 16, dtype=BRAIN)] * 2, Block(0.25))
    monkeypatch.setattr(metadata, "version", lambda name: "2.8.3")
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", None)
    flash.why_not.cache_clear()
    assert "version 2.8.3 cannot be imported: " in flash.why_not()
    monkeypatch.setattr(flash, "find_spec", lambda name: None)
    flash.why_not.cache_clear()
    assert flash.why_not() == "not installed"
