"""The page of a fold: the structure to turn, its plots and scores, in one file without network."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hairpin import __version__
from hairpin.errors import MissingExtraError, OutputError
from hairpin.report.fold.plots import (
    BANDS,
    draw_coverage,
    draw_distances,
    draw_pae,
    draw_plddt,
    save_png,
    svg_of,
)
from hairpin.run.fold import Prediction
from hairpin.units import format_bytes, format_time

_WIDE, _SQUARE, _PNG_SQUARE = (9.0, 3.1), (5.0, 4.1), (6.0, 5.0)
_MOST_SHOWN = 5  # models with plots of their own


@dataclass(frozen=True, eq=False)
class FoldPage:
    """What the page shows.

    Attributes:
        name: of the target.
        predictions: the best first.
        structures: the text of each one's PDB file, in the same order.
        letters: the alignment ``[s, r]`` as ASCII, the target first; None where there is none.
        command: the command line that repeats it.
        notes: what a person should know of the inputs.
    """

    name: str
    predictions: Sequence[Prediction]
    structures: Sequence[str]
    letters: NDArray[np.uint8] | None = None
    command: str = ""
    notes: Sequence[str] = ()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Residues of each chain."""
        return self.predictions[0].lengths


def write_plots(page: FoldPage, folder: Path) -> list[Path]:
    """The plots as PNG files: coverage, pLDDT, and of every model PAE and distances.

    Raises:
        MissingExtraError: matplotlib is absent.
        OutputError: a file cannot be written.
    """
    best, lengths = page.predictions[0], page.lengths
    save = partial(save_png, warning=best.rehearsal)
    lines = [(p.model, p.plddt) for p in page.predictions]
    draw = partial(draw_plddt, lines=lines, lengths=lengths)
    written = [save(draw, folder / "plddt.png", size=_WIDE)]
    if page.letters is not None:
        draw = partial(draw_coverage, letters=page.letters, lengths=lengths)
        written.append(save(draw, folder / "msa_coverage.png", size=_WIDE))
    draw = partial(draw_distances, distances=best.distances, lengths=lengths)
    written.append(save(draw, folder / "distogram.png", size=_PNG_SQUARE))
    for prediction in page.predictions:
        if prediction.pae is not None:
            draw = partial(draw_pae, pae=prediction.pae, lengths=lengths)
            path = folder / f"{prediction.model}_pae.png"
            written.append(save(draw, path, size=_PNG_SQUARE))
    return written


def write_page(path: Path, page: FoldPage) -> None:
    """Write the page.

    Raises:
        MissingExtraError: jinja2 or matplotlib is absent.
        OutputError: the file cannot be written.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError as error:
        raise MissingExtraError("the page needs jinja2: pip install 'hairpin[fold]'") from error
    here = files("hairpin.report.fold")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(bytes=format_bytes, time=format_time)
    template = environment.from_string(here.joinpath("page.html.j2").read_text(encoding="utf-8"))
    viewer = here.joinpath("3Dmol-min.js").read_text(encoding="utf-8")
    text = template.render(
        page=page,
        best=page.predictions[0],
        bands=BANDS,
        plots={name: Markup(svg) for name, svg in _plots(page).items()},  # noqa: S704  # our own SVG
        own_plots=[
            {name: Markup(svg) for name, svg in _own_plots(p).items()}  # noqa: S704  # our own SVG
            for p in page.predictions[:_MOST_SHOWN]
        ],
        structures=[text.replace("</", "") for text in page.structures],
        viewer=Markup(viewer.replace("</script", "<\\/script")),  # noqa: S704  # the bundled file
        residues=sum(page.lengths),
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(
            f"cannot write the page to {path}: {error.strerror or error}; choose another folder"
        ) from error


def _plots(page: FoldPage) -> dict[str, str]:
    lines = [(p.model, p.plddt) for p in page.predictions]
    plddt = svg_of(partial(draw_plddt, lines=lines, lengths=page.lengths), size=_WIDE)
    if page.letters is None:
        return {"plddt": plddt}
    draw = partial(draw_coverage, letters=page.letters, lengths=page.lengths)
    return {"plddt": plddt, "coverage": svg_of(draw, size=_WIDE)}


def _own_plots(prediction: Prediction) -> dict[str, str]:
    lengths = prediction.lengths
    distances = partial(draw_distances, distances=prediction.distances, lengths=lengths)
    plots = {"distances": svg_of(distances, size=_SQUARE)}
    if prediction.pae is not None:
        draw = partial(draw_pae, pae=prediction.pae, lengths=lengths)
        plots = {"pae": svg_of(draw, size=_SQUARE)} | plots
    return plots
