"""The seam table: what it says of each submodule holds."""

from dataclasses import replace

import pytest
import torch

from hairpin.layout import Pattern
from hairpin.models.alphafold import ATTENDS, TEMPLATE_ATTENDS, AlphaFold, presets
from hairpin.planning.split.seam import bind, match_table, stream_name
from trunk_oracle import random_features, randomize

TABLE = {**ATTENDS, **TEMPLATE_ATTENDS}


@pytest.fixture(scope="module", params=[False, True], ids=["monomer", "multimer"])
def calls(request):
    """Every module of the table, with the arguments and the result of its first call."""
    torch.manual_seed(0)
    config = presets.tiny(multimer=request.param)
    config = replace(config, data=replace(config.data, max_msa_clusters=6))
    model = randomize(AlphaFold(config)).double().eval()
    seen = {}

    def keep(path):
        def hook(module, args, kwargs, out):
            seen.setdefault(path, (module, bind(module, args, kwargs), out))

        return hook

    table = match_table(model, TABLE)
    for path in table.seams:
        model.get_submodule(path).register_forward_hook(keep(path), with_kwargs=True)
    with torch.no_grad():
        model(random_features(config, residues=9), recycles=0)
    assert set(seen) == set(table.seams)
    return table, seen


def test_every_line_matches_a_module(calls):
    table, _ = calls
    assert set(table.keys.values()) == set(TABLE)


def test_what_is_not_along_may_be_cut(calls):
    """A module given a part of such a dim gives that part of its result."""
    table, seen = calls
    cuts = 0
    for path, seam in table.seams.items():
        module, bound, out = seen[path]
        stream = stream_name(path, seam, bound)
        patterns = {stream: seam.stream, **seam.args}
        outs = out if isinstance(out, tuple) else (out,)
        free = [d for d in Pattern.parse(seam.stream).dims if d not in seam.along]
        for dim in free:
            if not all(dim in Pattern.parse(o).dims for o in seam.outputs):
                continue
            part = {
                name: cut(value, patterns[name], dim) if name in patterns else value
                for name, value in bound.items()
            }
            with torch.no_grad():
                got = module(**part)
            got = got if isinstance(got, tuple) else (got,)
            for one, whole, pattern in zip(got, outs, seam.outputs, strict=True):
                torch.testing.assert_close(one, cut(whole, pattern, dim), rtol=0, atol=1e-12)
                cuts += 1
    assert cuts > 100


def test_what_is_along_may_not_be_cut(calls):
    """Where the table has a bracket, a part of the dim gives another result, or none at all."""
    table, seen = calls
    tried = set()
    for path, seam in table.seams.items():
        brackets = Pattern.parse(seam.stream).bracketed
        if not brackets or table.keys[path] in tried:
            continue
        tried.add(table.keys[path])
        module, bound, out = seen[path]
        patterns = {stream_name(path, seam, bound): seam.stream, **seam.args}
        (dim,) = brackets
        part = {
            name: cut(value, patterns[name], dim) if name in patterns else value
            for name, value in bound.items()
        }
        try:
            with torch.no_grad():
                got = module(**part)
        except RuntimeError:
            continue
        (pattern,) = seam.outputs
        whole = cut(out, pattern, dim) if dim in Pattern.parse(pattern).dims else out
        assert not torch.allclose(got, whole), path
    assert len(tried) > 8


def cut(tensor, pattern, dim):
    dims = Pattern.parse(pattern).dims
    assert len(dims) == tensor.ndim, (pattern, tensor.shape)
    return tensor.narrow(dims.index(dim), 1, 2) if dim in dims else tensor
