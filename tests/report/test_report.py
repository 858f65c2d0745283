"""The report holds all it shows, asks nothing of a network, and escapes what it is given."""

import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image

from hairpin.comm.mesh import Mesh
from hairpin.errors import OutputError
from hairpin.planning.plan import Plan
from hairpin.report import Report, environment, write_report
from hairpin.report.chart import loss_chart, running_mean
from hairpin.run.recipes import tiny
from hairpin.run.train import build_model, plan_video
from hairpin.units import format_bytes, format_time

METRICS = [
    {
        "step": step,
        "loss": 2.0 / step,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "samples_per_s": 8.0,
        "bytes_sent": [3072, 1024],
        "peak_memory_bytes": [5 * 2**20, 2**20],
        "time_s": 0.5,
    }
    for step in range(1, 101)
]
VOID = {"meta", "img", "br", "path", "use", "rect", "circle", "line"}


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def plan() -> Plan:
    """The tiny video model over two ranks."""
    model = build_model(tiny(), device=torch.device("cpu"))
    found = plan_video(model, tiny(), Mesh(dp=1, sp=2), clips=2)
    return replace(found, notes=("'head' cannot run on a part of dim 't': it averages",))


@pytest.fixture
def report(tmp_path, plan):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "film.gif")
    Image.new("RGB", (4, 4), "blue").save(tmp_path / "sheet.png")
    return Report(
        title="digits",
        command="hairpin train video --ranks 2",
        recipe={"name": "digits", "model": {"channels": 64}, "betas": (0.9, 0.99)},
        metrics=METRICS,
        plan=plan,
        mesh={"dp": 1, "sp": 2},
        film=tmp_path / "film.gif",
        sheet=tmp_path / "sheet.png",
        figures=[("likeness", "20.1 dB")],
        environment=[("torch", "2.13.0")],
    )


@pytest.fixture
def written(tmp_path):
    def write(report: Report) -> str:
        write_report(tmp_path / "report.html", report)
        return (tmp_path / "report.html").read_text()

    return write


def test_the_page_asks_nothing_of_a_network(report, written):
    text = written(report)
    assert "http" not in text
    assert "@import" not in text
    page = Page(text)
    sources = [value for name, value in page.attributes if name in ("src", "href", "xlink:href")]
    assert len(sources) >= 2
    assert all(value.startswith(("data:", "#")) for value in sources)
    assert "<script" not in text


def test_the_page_shows_the_run(report, plan, written):
    text = Page(written(report)).text
    for words in [
        "dp 1, sp 2",
        "20.1 dB",
        "blocks.0.temporal",
        plan.moves[-1].src,
        format_bytes(plan.moves[-1].bytes),
        format_time(plan.moves[-1].time_s),
        "hairpin train video --ranks 2",
        "model.channels",
        "torch",
        "5.00 MiB",
        "'head' cannot run on a part of dim 't'",
    ]:
        assert words in text
    still = sum(not stage.moves for stage in plan.stages)
    assert text.count("stays as it is") == still


def test_the_largest_rank_fills_its_bar(report, written):
    shares = re.findall(r"--share: ([\d.]+)%", written(report))
    assert shares == ["100.0", "100.0", "33.3", "20.0"]


def test_both_pictures_are_within(report, written):
    text = written(report)
    assert "data:image/gif;base64,R0lGOD" in text
    assert "data:image/png;base64,iVBOR" in text


def test_a_run_on_one_rank_says_that_nothing_was_split(report, written):
    text = Page(written(replace(report, plan=None))).text
    assert "The model was not split" in text


def test_a_report_without_samples_or_metrics_is_whole(report, written):
    bare = replace(report, film=None, sheet=None, metrics=[], plan=None)
    text = Page(written(bare)).text
    assert "Samples" not in text
    assert "Bytes and memory" not in text


def test_text_is_escaped(report, written):
    text = written(replace(report, title="<script>x</script>", command="a && b"))
    assert "<script" not in text
    assert "a &amp;&amp; b" in text


def test_a_folder_that_is_not_there_is_an_error(report, tmp_path):
    with pytest.raises(OutputError, match=r"cannot write the report to .*No such file"):
        write_report(tmp_path / "absent" / "report.html", report)


def test_the_environment_names_versions_and_no_person():
    rows = dict(environment())
    assert {"hairpin", "Python", "torch", "system", "processor"} <= set(rows)
    assert not any("/" in value for value in rows.values())


# ------------------------------------------------------------------------------------------- chart


def test_the_chart_takes_its_colours_from_the_page():
    svg = loss_chart(METRICS)
    assert svg.startswith("<svg")
    assert "var(--accent)" in svg
    assert "var(--ink)" in svg
    assert "#010203" not in svg
    assert ">step</text>" in svg  # text stays text


def test_the_chart_of_one_step_can_be_drawn():
    assert "</svg>" in loss_chart(METRICS[:1])


def test_the_running_mean():
    assert running_mean([1.0, 3.0, 5.0, 7.0], window=2) == [1.0, 2.0, 4.0, 6.0]
    assert running_mean([1.0, 3.0], window=1) == [1.0, 3.0]
