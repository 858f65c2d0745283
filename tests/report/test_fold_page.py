"""The plots and the page of a fold."""

import re

import numpy as np
import pytest

from hairpin.errors import OutputError
from hairpin.proteins.metrics import Violations
from hairpin.proteins.write import predicted_chain
from hairpin.report.fold.page import FoldPage, write_page, write_plots
from hairpin.report.fold.plots import (
    BANDS,
    _identity,
    draw_coverage,
    draw_distances,
    draw_pae,
    draw_plddt,
    figure_of,
)
from hairpin.run.fold import Prediction


def prediction(model="model_1_ptm", lengths=(6, 4), *, pae=True, rehearsal=""):
    n = sum(lengths)
    plddt = np.linspace(30, 95, n)
    ends = np.cumsum((0, *lengths))
    chains = tuple(
        predicted_chain(name, "G" * r, np.ones((r, 37, 3)), plddt[start : start + r])
        for name, r, start in zip("AB", lengths, ends, strict=False)
    )
    return Prediction(
        model=model,
        chains=chains,
        plddt=plddt,
        pae=np.ones((n, n)) if pae else None,
        max_pae=31.75,
        ptm=0.5 if pae else None,
        iptm=None,
        ranking=float(plddt.mean()),
        distances=np.full((n, n), 9.0),
        recycles=3,
        violations=Violations(0, 0, 0, 0, 0, 0.0),
        seed=0,
        time_s=1.0,
        peak_bytes=2**20,
        rehearsal=rehearsal,
    )


def page(**changes):
    given = {
        "name": "a <target>",
        "predictions": [prediction(), prediction("model_3", pae=False)],
        "structures": ["ATOM one\n", "ATOM two\n"],
        "letters": np.frombuffer(b"GGGGGGGGGGGGGGG-----AAAAAAAAAA", np.uint8).reshape(3, 10),
        "notes": ["something to know"],
    }
    return FoldPage(**(given | changes))


def test_the_page_holds_everything_and_asks_nothing_of_a_network(tmp_path):
    write_page(tmp_path / "index.html", page())
    text = (tmp_path / "index.html").read_text()
    assert "a &lt;target&gt;" in text
    assert "something to know" in text
    assert text.count("<svg") == 2 + 2 + 1  # pLDDT and coverage; PAE and distances, distances
    assert "ATOM one" in text
    assert "ATOM two" in text
    assert "3dmol v2.5.5" in text.lower() or "3Dmol" in text
    ours = re.sub(r"<script>.*?</script>", "", text, count=1, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']https?:", ours)
    assert "REHEARSAL" not in text


def test_a_rehearsal_has_a_banner(tmp_path):
    marked = prediction(rehearsal="REHEARSAL WITH RANDOM WEIGHTS (x)")
    write_page(tmp_path / "index.html", page(predictions=[marked], structures=["ATOM\n"]))
    assert '<p class="alarm" role="alert">REHEARSAL' in (tmp_path / "index.html").read_text()


def test_a_structure_cannot_end_its_element(tmp_path):
    write_page(tmp_path / "index.html", page(structures=["REMARK </script><b>\n", "ATOM\n"]))
    assert "</script><b>" not in (tmp_path / "index.html").read_text()


def test_plots_are_png_files(tmp_path):
    written = write_plots(page(), tmp_path)
    names = {path.name for path in written}
    assert names == {"plddt.png", "msa_coverage.png", "distogram.png", "model_1_ptm_pae.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in written)
    with pytest.raises(OutputError, match="cannot write"):
        write_plots(page(), tmp_path / "none")


def test_coverage_sorts_by_identity_and_counts_residues():
    letters = np.frombuffer(b"GGGGGA--GGGA", np.uint8).reshape(3, 4)
    figure = figure_of(lambda axes, inks: draw_coverage(axes, inks, letters, [4]), size=(4, 3))
    axes = figure.axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown[:, 0], [0.25, 0.75, 1.0])
    assert shown.mask[0, 2:].all()
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), [3, 3, 2, 2])


def test_identity_in_a_complex_is_of_the_chains_that_a_row_covers():
    letters = np.frombuffer(b"GGAAGG--", np.uint8).reshape(2, 4)
    np.testing.assert_allclose(_identity(letters, [2, 2]), [1, 1])
    np.testing.assert_allclose(_identity(letters, [4]), [1, 0.5])


def test_the_bands_of_confidence_and_the_chains_boundaries():
    assert [band[:2] for band in BANDS] == [(90, 100), (70, 90), (50, 70), (0, 50)]
    lines = [("a", np.full(5, 80.0))]
    plddt = figure_of(lambda axes, inks: draw_plddt(axes, inks, lines, [3, 2]), size=(4, 3))
    assert {line.get_xdata()[0] for line in plddt.axes[0].lines if len(line.get_xdata()) == 2} == {
        3.5
    }
    pae = figure_of(lambda axes, inks: draw_pae(axes, inks, np.ones((5, 5)), [3, 2]), size=(4, 3))
    assert len(pae.axes[0].lines) == 2


@pytest.mark.parametrize("size", [(5.0, 4.1), (6.0, 5.0)])
@pytest.mark.parametrize("draw", [draw_pae, draw_distances])
@pytest.mark.parametrize("residues", [5, 160, 2300])
def test_no_text_of_a_matrix_is_cut_off(draw, size, residues):
    """Labels and numbers of both axes and of the colour bar lie on the figure."""
    matrix = np.ones((residues, residues))
    figure = figure_of(lambda axes, inks: draw(axes, inks, matrix, [residues]), size=size)
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    for axes in figure.axes:
        box = axes.get_tightbbox()
        assert min(box.x0, box.y0) >= 0
        assert box.x1 <= width
        assert box.y1 <= height


@pytest.mark.parametrize("residues", [1, 3, 5])
def test_residues_are_whole_numbers(residues):
    letters = np.full((2, residues), ord("G"), np.uint8)
    lines = [("a", np.full(residues, 80.0))]
    plots = (
        lambda axes, inks: draw_coverage(axes, inks, letters, [residues]),
        lambda axes, inks: draw_plddt(axes, inks, lines, [residues]),
        lambda axes, inks: draw_pae(axes, inks, np.ones((residues, residues)), [residues]),
    )
    for draw in plots:
        figure = figure_of(draw, size=(9, 3))
        figure.canvas.draw()
        ticks = figure.axes[0].get_xticks()
        assert len(ticks)
        assert (ticks == ticks.round()).all()


def test_the_plots_of_a_rehearsal_say_so(tmp_path):
    """The warning is on the picture: without it the pixels at the top are other ones."""
    from PIL import Image

    tops = []
    for folder, warning in (("plain", ""), ("marked", "REHEARSAL WITH RANDOM WEIGHTS (x)")):
        (tmp_path / folder).mkdir()
        write_plots(page(predictions=[prediction(rehearsal=warning)]), tmp_path / folder)
        pictures = [np.asarray(Image.open(path)) for path in sorted((tmp_path / folder).iterdir())]
        tops.append([(picture[:40, :, :3] == (166, 27, 27)).all(-1).sum() for picture in pictures])
    assert max(tops[0]) == 0
    assert min(tops[1]) > 0
