"""`hairpin verify fold --ranks`: DeepMind's numbers are those of a model that is split.

Every comparison runs in launched ranks: this process must run no backward, for it forks.
"""

import itertools

import pytest

from hairpin.errors import DisagreementError
from hairpin.planning.axial.way import Line
from hairpin.run import verify
from hairpin.run.launch import RankFailure, launch

FILES = {path.stem: path for path in verify.shipped()}
SMALL = "monomer_notemplates_recycle0"
TRAINED = "monomer_ptm_templates_recycle1"
WAYS = list(itertools.product(["gather", "ring", "channels"], ["gather", "ring"]))


def verdicts(ranks, names, product="gather", passing="gather"):
    """What every rank found."""
    paths = [FILES[name] for name in names]
    found = launch(
        verify.verify_on_ranks,
        ranks,
        paths,
        sp=ranks,
        product=product,
        passing=passing,
        timeout_s=600,
    )
    assert all(len(of_rank) == len(names) for of_rank in found)
    return found


def failures(verdict):
    return [check.name for check in verdict.checks if not check.passed]


@pytest.mark.parametrize(
    ("ranks", "product", "passing"), [(2, "ring", "ring"), (3, "channels", "gather")]
)
def test_a_split_model_gives_deepminds_numbers(ranks, product, passing):
    for modules, model in verdicts(ranks, ["evoformer_modules", SMALL], product, passing):
        assert failures(modules) == failures(model) == []
        assert (modules.ranks, len(modules.checks), len(model.checks)) == (ranks, 14, 51)
        notes = {check.name.split("/")[0]: check.note for check in modules.checks}
        split = {name for name, note in notes.items() if note == "split"}
        assert split == {"evoformer_iteration", "extra_msa_iteration"}
        assert set(notes.values()) == {"split", "whole on every rank"}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize(("product", "passing"), WAYS)
def test_every_file_passes_over_ranks(ranks, product, passing):
    for found in verdicts(ranks, sorted(FILES), product, passing):
        assert {verdict.file: failures(verdict) for verdict in found} == {
            f"{name}.npz": [] for name in FILES
        }
        assert sum(check.name.startswith("grad/") for check in found[3].checks) == 338


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_gradients_that_were_not_averaged_fail(monkeypatch):
    monkeypatch.setattr(verify, "sync_grads", lambda *_: None)
    with pytest.raises(RankFailure) as info:  # not even alike on the ranks
        verdicts(2, [TRAINED])
    assert isinstance(info.value.__cause__, DisagreementError)
    assert "grad/alphafold" in str(info.value)


def test_a_term_that_is_lost_on_its_way_fails(monkeypatch):
    monkeypatch.setattr(Line, "summed", lambda way, x, _, dim: Lost(x[way.mine(dim)]))
    for (modules,) in verdicts(2, ["evoformer_modules"]):
        assert failures(modules) == ["evoformer_iteration/out/pair", "extra_msa_iteration/out/pair"]


class Lost:
    """This rank's term alone, in the place of the sum of all."""

    def __init__(self, x):
        self.x = x

    def wait(self):
        return self.x
