"""Running a command in this process, in an empty folder."""

import sys
from dataclasses import dataclass

import pytest

from hairpin.cli.app import main


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder; modules imported from it are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for written in tmp_path.glob("*.py"):
        sys.modules.pop(written.stem, None)


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """`run("plan", "m:build")` gives the exit code, stdout and stderr."""

    def run_command(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["hairpin", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            main()
        captured = capsys.readouterr()
        code = stop.value.code
        return Done(code if isinstance(code, int) else int(bool(code)), captured.out, captured.err)

    return run_command


MODEL = """
import torch
from torch import nn


class Along(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.dim, self.linear = dim, nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x).softmax(self.dim)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.rows, self.columns = Along(2), Along(1)

    def forward(self, x):
        return self.columns(self.rows(x))


ATTENDS = {"rows": "b t [s] c", "columns": "b [t] s c"}
NUMBER = 3


def model():
    return Model()


def example():
    return torch.zeros(2, 6, 10, 8)


def pair():
    return Model(), example()


def whole():
    return Model(), example(), ATTENDS


def by_value():
    made = Model()
    float(made.rows.linear.weight.sum())
    return made, example(), ATTENDS
"""


@pytest.fixture
def model(folder):
    """A module `small` in the current folder with a two-dim model in several forms."""
    (folder / "small.py").write_text(MODEL)
