"""Our Evoformer block against OpenFold's, with the same weights on the CPU: time and peak of each.

OpenFold (github.com/aqlaboratory/openfold) is read from a folder beside the project and runs as its
authors wrote it. Dims: s sequences, r residues (i, j), c channels.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import hairpin as hp
from hairpin.bench.absent import placeholders
from hairpin.bench.evoformer import randomise
from hairpin.bench.measure import machine
from hairpin.bench.steps import (
    Say,
    errors,
    interleave,
    one_thread,
    peak_bytes,
    time_ratio,
)
from hairpin.errors import HairpinError, MissingExtraError
from hairpin.models.alphafold.config import BlockConfig
from hairpin.models.alphafold.evoformer import EvoformerBlock

Pair = tuple[Tensor, Tensor]

SIZES = ((64, 128), (128, 256))
DIRECTIONS = ("forward", "forward and backward")

_PLAIN = "as it is"
_CHECKPOINTED = "block checkpointed"
_FORWARD: Mapping[str, Mapping[str, Any]] = {
    "chunks of 64": {"chunk_size": 64},
    "in place": {"inplace_safe": True},
    "in place, chunks of 4": {"inplace_safe": True, "chunk_size": 4},
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure.

    Attributes:
        openfold: folder of a checkout of OpenFold.
        sizes: pairs of sequences and residues.
        rounds: timed turns; the median counts.
        config: widths of both blocks; by default AlphaFold's.
    """

    openfold: str
    sizes: Sequence[tuple[int, int]] = SIZES
    rounds: int = 5
    config: BlockConfig = field(default_factory=BlockConfig)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to run the block; None where there is no figure.

    Attributes:
        whose: ``"OpenFold"`` or ``"ours"``.
        setting: options of OpenFold, or the budget of ours.
        budget_bytes: of ours.
        peak_bytes: most that the run holds beyond parameters and inputs, with outputs; in a
            backward gradients too.
        peak_ratio: to OpenFold's as it is; ``time_ratio``: the same of process time.
        relative_error: of the outputs (in a backward of all gradients) from OpenFold's as it is.
        note: why there are no figures.
    """

    sequences: int
    residues: int
    direction: str
    whose: str = ""
    setting: str = ""
    budget_bytes: int | None = None
    peak_bytes: int | None = None
    peak_ratio: float | None = None
    time_s: float | None = None
    time_ratio: float | None = None
    relative_error: float | None = None
    note: str = ""


def measure(settings: Settings, *, say: Say) -> dict[str, Any]:
    """Run both blocks at every size. Gives plain data; ``say`` is told what goes on.

    Raises:
        MissingExtraError: the folder holds no OpenFold, or a library that it needs is absent.
    """
    described, config = machine(), settings.config
    theirs, ours = blocks(settings.openfold, config)
    rows: list[Row] = []
    with one_thread():
        for sequences, residues in settings.sizes:
            for direction in DIRECTIONS:
                blank = Row(
                    sequences=sequences,
                    residues=residues,
                    direction=direction,
                    whose="",
                    setting="",
                )
                sizes = (sequences, residues, config.c_m, config.c_z)
                bench = _Bench.of(theirs, ours, sizes, grad=direction != "forward")
                rows.extend(bench.rows(blank, rounds=settings.rounds, say=say))
    return {
        "benchmark": "openfold",
        "machine": described,
        "settings": {"sizes": settings.sizes, "rounds": settings.rounds, "config": asdict(config)},
        "table": [asdict(row) for row in rows],
    }


# ----------------------------------------------------------------------------------- the two blocks


def blocks(folder: str | Path, config: BlockConfig) -> tuple[nn.Module, EvoformerBlock]:
    """OpenFold's Evoformer block and ours, in eval mode and with the same random weights.

    Raises:
        MissingExtraError: the folder holds no OpenFold, or a library that it needs is absent.
    """
    ours = EvoformerBlock(config).eval()
    randomise(ours)
    theirs = _their_block(_evoformer_module(Path(folder)), config).eval()
    theirs.load_state_dict(_as_theirs(ours.state_dict()))
    return theirs, ours


def _evoformer_module(folder: Path) -> Any:
    """``openfold.model.evoformer``, imported without the rest of the package or CUDA kernels."""
    package = folder / "openfold"
    if not (package / "model" / "evoformer.py").is_file():
        raise MissingExtraError(
            f"{folder} holds no openfold/model/evoformer.py; name the folder of a checkout of "
            "github.com/aqlaboratory/openfold with --openfold"
        )
    try:
        with _only_package("openfold", package), placeholders("attn_core_inplace_cuda"):
            return importlib.import_module("openfold.model.evoformer")
    except ImportError as error:
        raise MissingExtraError(
            f"OpenFold in {folder} cannot be imported: {error}; install what it names"
        ) from error


@contextmanager
def _only_package(name: str, folder: Path) -> Iterator[None]:
    """``import name.part`` reads from ``folder``, without what the package itself would import.

    Afterwards whatever went by this name before does so again.
    """
    before = _take_out(name)
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    try:
        yield
    finally:
        _take_out(name)
        sys.modules.update(before)


def _take_out(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name.partition(".")[0] == package]
    return {name: sys.modules.pop(name) for name in names}


def _their_block(module: Any, config: BlockConfig) -> nn.Module:
    c = config
    block: nn.Module = module.EvoformerBlock(
        c_m=c.c_m,
        c_z=c.c_z,
        c_hidden_msa_att=c.c_m // c.msa_heads,
        c_hidden_opm=c.c_outer,
        c_hidden_mul=c.c_triangle,
        c_hidden_pair_att=c.c_z // c.pair_heads,
        no_heads_msa=c.msa_heads,
        no_heads_pair=c.pair_heads,
        transition_n=c.msa_transition_factor,
        msa_dropout=c.msa_dropout,
        pair_dropout=c.pair_dropout,
        no_column_attention=False,
        opm_first=c.outer_first,
        fuse_projection_weights=False,
        inf=1e9,
        eps=1e-8,
    )
    return block


_ATTENTION = {
    "query": "linear_q",
    "key": "linear_k",
    "value": "linear_v",
    "gate": "linear_g",
    "output": "linear_o",
}
_TRANSITION = {"norm": "layer_norm", "linear_1": "linear_1", "linear_2": "linear_2"}
_OUTER = {
    "norm": "layer_norm",
    "left.linear": "linear_1",
    "right.linear": "linear_2",
    "output": "linear_out",
}


def _triangle_names(left: str, right: str) -> dict[str, str]:
    """Their operands of incoming edges go by each other's names."""
    return {
        "norm": "layer_norm_in",
        "operands.left_projection": f"linear_{left}_p",
        "operands.right_projection": f"linear_{right}_p",
        "operands.left_gate": f"linear_{left}_g",
        "operands.right_gate": f"linear_{right}_g",
        "center_norm": "layer_norm_out",
        "output_projection": "linear_z",
        "gating_linear": "linear_g",
    }


def _names() -> dict[str, str]:
    """Our modules that hold parameters, and what OpenFold calls each."""
    names = {
        "msa_row_attention_with_pair_bias.query_norm": "msa_att_row.layer_norm_m",
        "msa_row_attention_with_pair_bias.pair_bias.norm": "msa_att_row.layer_norm_z",
        "msa_row_attention_with_pair_bias.pair_bias.linear": "msa_att_row.linear_z",
        "msa_column_attention.query_norm": "msa_att_col._msa_att.layer_norm_m",
    }
    parts = [
        ("msa_row_attention_with_pair_bias.attention", "msa_att_row.mha", _ATTENTION),
        ("msa_column_attention.attention", "msa_att_col._msa_att.mha", _ATTENTION),
        ("msa_transition", "msa_transition", _TRANSITION),
        ("outer_product_mean", "outer_product_mean", _OUTER),
        ("pair_stack.pair_transition", "pair_stack.pair_transition", _TRANSITION),
    ]
    for end, short, left, right in (("outgoing", "out", "a", "b"), ("incoming", "in", "b", "a")):
        ours = f"pair_stack.triangle_multiplication_{end}"
        parts.append((ours, f"pair_stack.tri_mul_{short}", _triangle_names(left, right)))
    for node, short in (("starting", "start"), ("ending", "end")):
        ours, theirs = f"pair_stack.triangle_attention_{node}_node", f"pair_stack.tri_att_{short}"
        parts.append((f"{ours}.attention", f"{theirs}.mha", _ATTENTION))
        names |= {f"{ours}.query_norm": f"{theirs}.layer_norm"}
        names |= {f"{ours}.pair_bias.linear": f"{theirs}.linear"}
    for our_part, their_part, table in parts:
        names |= {f"{our_part}.{a}": f"{their_part}.{b}" for a, b in table.items()}
    return names


def _as_theirs(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our parameters by OpenFold's names; both lay them out alike."""
    names = _names()
    split = {name: name.rpartition(".") for name in state}
    return {f"{names[split[name][0]]}.{split[name][2]}": state[name] for name in state}


# --------------------------------------------------------------------------------------- the table


@dataclass(frozen=True)
class _Way:
    """One way to run one of the blocks: ``forward(m, z, msa_mask, pair_mask) -> (m, z)``."""

    whose: str
    setting: str
    model: nn.Module
    forward: Callable[..., Pair]
    args: tuple[Tensor, ...]
    budget_bytes: int | None = None

    @property
    def key(self) -> str:
        return f"{self.whose}, {self.setting}"


@dataclass(frozen=True)
class _Bench:
    """One size and one direction: every way to run the blocks, measured in turn.

    Attributes:
        args: ``m[s, r, c_m], z[i, j, c_z], msa_mask[s, r], pair_mask[i, j]``.
        cotangents: gradients of the two outputs.
    """

    theirs: nn.Module
    ours: EvoformerBlock
    grad: bool
    args: tuple[Tensor, ...]
    cotangents: tuple[Tensor, ...]

    @classmethod
    def of(
        cls, theirs: nn.Module, ours: EvoformerBlock, sizes: tuple[int, ...], *, grad: bool
    ) -> "_Bench":
        """At ``sizes = (s, r, c_m, c_z)``; the blocks need gradients afterwards, or do not."""
        args = example(*sizes)
        generator = torch.Generator().manual_seed(2)
        cotangents = tuple(
            torch.randn(x.shape, generator=generator) * kept[..., None]  # no loss asks for padding
            for x, kept in zip(args[:2], args[2:], strict=True)
        )
        for each in (*args[:2], *theirs.parameters(), *ours.parameters()):
            each.requires_grad_(grad)
        return cls(theirs, ours, grad, args, cotangents)

    def rows(self, blank: Row, *, rounds: int, say: Say) -> list[Row]:
        """OpenFold in every way, ours as it is, and ours within OpenFold's peaks and half of one.

        A budget that cannot be met gives a row with the reason.
        """
        ways = [*self._their_ways(), _Way("ours", _PLAIN, self.ours, self.ours, self.args)]
        peaks = {way.key: self._peak_bytes(way) for way in ways}
        refused: list[Row] = []
        for setting, budget in _budgets(ways, peaks).items():
            try:
                way = self._budgeted(setting, budget)
            except HairpinError as error:
                note = f"{type(error).__name__}: {error}"
                row = replace(blank, whose="ours", setting=setting, budget_bytes=budget, note=note)
                refused.append(row)
                continue
            ways.append(way)
            peaks[way.key] = self._peak_bytes(way)
        truth = self._result(ways[0])
        relative = {way.key: errors(self._result(way), truth)[1] for way in ways}
        times_s = interleave({way.key: partial(self._step, way) for way in ways}, rounds=rounds)
        base = ways[0].key
        found = [
            replace(
                blank,
                whose=way.whose,
                setting=way.setting,
                budget_bytes=way.budget_bytes,
                peak_bytes=peaks[way.key],
                peak_ratio=peaks[way.key] / peaks[base],
                time_s=median(times_s[way.key]),
                time_ratio=time_ratio(times_s[way.key], times_s[base]),
                relative_error=relative[way.key],
            )
            for way in ways
        ]
        for row in [*found, *refused]:
            say(_line(row))
        return [*found, *refused]

    def _their_ways(self) -> list[_Way]:
        # as OpenFold's own configuration and DeepMind's code: transitions are not masked
        plain = partial(self.theirs, _mask_trans=False)
        ways = [_Way("OpenFold", _PLAIN, self.theirs, plain, self.args)]
        if self.grad:
            again = partial(checkpoint, plain, use_reentrant=False)
            return [*ways, _Way("OpenFold", _CHECKPOINTED, self.theirs, again, self.args)]
        for setting, options in _FORWARD.items():
            # those in place write over m and z, which are then their own
            args = (*(x.clone() for x in self.args[:2]), *self.args[2:])
            forward = partial(plain, **options)
            ways.append(_Way("OpenFold", setting, self.theirs, forward, args))
        return ways

    def _budgeted(self, setting: str, budget: int) -> _Way:
        model = deepcopy(self.ours)
        with torch.set_grad_enabled(self.grad):
            plan = hp.plan(model, (self.args, {}), memory=budget, backward=self.grad)
        planned = hp.parallelize(model, plan)
        return _Way("ours", setting, planned, planned, self.args, budget)

    def _peak_bytes(self, way: _Way) -> int:
        """From no gradients to all of them."""
        self._step(way)
        _drop_gradients(way)
        peak = peak_bytes(partial(self._step, way), warm=False)
        _drop_gradients(way)
        return peak

    def _step(self, way: _Way) -> None:
        self._run(way, way.args)

    def _run(self, way: _Way, args: tuple[Tensor, ...]) -> Pair:
        if not self.grad:
            with torch.no_grad():
                return way.forward(*args)
        _drop_gradients(way)
        outputs = way.forward(*args)
        torch.autograd.backward(outputs, self.cotangents)
        return outputs

    def _result(self, way: _Way) -> list[Tensor]:
        """Both outputs but padding and, in a backward, all gradients by OpenFold's names."""
        fresh = [x.detach().clone().requires_grad_(self.grad) for x in self.args[:2]]
        outputs = self._run(way, (*fresh, *self.args[2:]))
        gradients = {name: _gradient(p) for name, p in way.model.named_parameters() if self.grad}
        if way.whose == "ours":
            gradients = _as_theirs(gradients)
        of_inputs = [_gradient(x) for x in fresh if self.grad]
        _drop_gradients(way)
        asked = [x * kept[..., None] for x, kept in zip(outputs, self.args[2:], strict=True)]
        return [*asked, *of_inputs, *(gradients[name] for name in sorted(gradients))]


def example(sequences: int, residues: int, c_m: int, c_z: int) -> tuple[Tensor, ...]:
    """``m[s, r, c_m], z[i, j, c_z], msa_mask[s, r], pair_mask[i, j]``, seeded.

    One residue in sixteen and one sequence in sixteen is padding.
    """
    generator = torch.Generator().manual_seed(1)
    m = torch.randn(sequences, residues, c_m, generator=generator)
    z = torch.randn(residues, residues, c_z, generator=generator)
    rows, columns = _padded(sequences), _padded(residues)
    return m, z, rows[:, None] * columns, columns[:, None] * columns


def _padded(length: int) -> Tensor:
    return (torch.arange(length) < length - length // 16).float()


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone()


def _drop_gradients(way: _Way) -> None:
    for leaf in (*way.model.parameters(), *way.args):
        leaf.grad = None


def _budgets(ways: Sequence[_Way], peaks: Mapping[str, int]) -> dict[str, int]:
    """Half of OpenFold's peak as it is, and what it holds in each of its ways."""
    first = peaks[ways[0].key]
    theirs = {way.setting: peaks[way.key] for way in ways if way.whose == "OpenFold"}
    same = {f"within OpenFold's, {setting}": peak for setting, peak in theirs.items()}
    return {**same, f"within half of OpenFold's, {_PLAIN}": first // 2}


def _line(row: Row) -> str:
    where = f"{row.sequences} x {row.residues}, {row.direction}: {row.whose}, {row.setting}"
    if row.peak_bytes is None:
        return f"{where}: {row.note.splitlines()[0]}"
    return (
        f"{where}: peak {row.peak_bytes / 2**20:.1f} MiB ({row.peak_ratio:.2f}), "
        f"{row.time_s:.2f} s ({row.time_ratio:.2f}), error {row.relative_error:.0e}"
    )
