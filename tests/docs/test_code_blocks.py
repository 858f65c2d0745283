"""The code in the README and the pages works: Python blocks run, shell lines run or at least parse.

A page's Python blocks run one after another in one namespace, at world 1, in an empty folder. A
block with a title is a file: it is written there for the page's other blocks and commands to use.
The files of the quickstart are there for every page.
"""

import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer.main

from hairpin.cli.app import app, main

ROOT = Path(__file__).parents[2]
PAGES = sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").rglob("*.md"))
_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_TITLE = re.compile(r'title="([^"]+)"')
_EXECUTED = {"doctor", "plan", "show", "profile"}  # quick ones; the others are only parsed


@dataclass(frozen=True)
class Block:
    language: str
    title: str | None
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(
            match[1],
            title[1] if (title := _TITLE.search(match[2])) else None,
            match[3],
            text[: match.start()].count("\n") + 1,
        )
        for match in _BLOCK.finditer(text)
    ]


def shell_lines(page: Path) -> list[str]:
    text = [b.text for b in blocks(page) if b.language in ("sh", "bash", "console", "shell")]
    lines = "".join(text).replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines if line.strip()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder with the quickstart's files, the current one while the test runs."""
    for block in blocks(ROOT / "docs/quickstart.md"):
        if block.title and block.title.endswith(".py"):
            (tmp_path / block.title).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    yield tmp_path
    for written in tmp_path.glob("*.py"):
        sys.modules.pop(written.stem, None)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_PYTHON = [p for p in PAGES if any(b.language == "python" and not b.title for b in blocks(p))]
COMMANDS = [(page, line) for page in PAGES for line in shell_lines(page)]


def test_there_is_something_to_test():
    assert {"README.md", "docs/quickstart.md", "docs/concepts.md"} <= {name(p) for p in WITH_PYTHON}
    assert len(COMMANDS) > 10


@pytest.mark.parametrize("page", WITH_PYTHON, ids=name)
def test_python_blocks_run(page, folder):
    scope = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python" and block.title is None:
            source = "\n" * block.line + block.text  # so that a traceback names the page's line
            exec(compile(source, str(page), "exec"), scope)  # noqa: S102  # our own pages


def run_main(line: str, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", shlex.split(line))
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code, f"{line!r} gave exit code {stop.value.code}"


@pytest.mark.parametrize(
    ("page", "line"), COMMANDS, ids=lambda x: x if isinstance(x, str) else name(x)
)
def test_shell_lines_work(page, line, folder, monkeypatch, capsys):
    words = shlex.split(line)
    if words[0] == "hairpin" and words[1] in _EXECUTED:
        if words[1] == "show":
            run_main("hairpin plan axial:build --devices 4 -o plan.toml", monkeypatch)
        run_main(line, monkeypatch)
        assert capsys.readouterr().out
    elif words[0] == "hairpin":
        parse(words[1:])
    elif words[0] == "make":
        target = next(word for word in words[1:] if "=" not in word)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif "hairpin.cli" in words:
        parse(words[words.index("hairpin.cli") + 1 :])
    elif words[0] in ("python", "torchrun"):
        assert (folder / words[-1]).exists()  # the test of the losses runs it
    else:
        assert words[0] in ("pip", "git", "cd"), f"{name(page)}: nothing here tests {line!r}"


def parse(words: list[str]) -> None:
    """Let the command line read a command without running it."""
    command = typer.main.get_command(app)
    path = "hairpin"
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{path} has no command {words[0]!r}"
        command, path, words = command.commands[words[0]], f"{path} {words[0]}", words[1:]
    if "--help" not in words:
        command.make_context(path, words)


@pytest.mark.slow
def test_the_losses_of_the_quickstart_do_not_depend_on_the_ranks(folder):
    """`python train.py` and `torchrun ... train.py` print the same losses, as the page says."""
    environment = {"PYTHONPATH": f"{ROOT / 'src'}", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"}

    def losses(*start: str) -> list[float]:
        done = subprocess.run(
            [sys.executable, *start, "train.py"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=90,
        )
        return [float(text) for text in re.findall(r"loss ([0-9.]+)", done.stdout)]

    alone = losses()
    assert len(alone) == 3
    assert losses("-m", "torch.distributed.run", "--nproc-per-node", "2") == pytest.approx(
        alone, rel=1e-5
    )


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_named_on_a_page_exist(page):
    for path in re.findall(r"`((?:src|tests|scripts|docs|benchmarks)/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), f"{name(page)} names {path}"
