"""What this machine does in a second: the figures that the choice of loops weighs.

They come from a few small measurements, the least time of several tries each, so that a busy
machine disturbs them little. They are taken once and kept in the cache folder.
"""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from hairpin.planning.cache import Cache, cache_folder, digest_of

_MIB = 2**20
_NEW_BYTES = 48 * _MIB
_PLAIN_BYTES = 24 * _MIB
_MEASUREMENTS = 3  # tries before the fixed speeds are taken: the machine may be busy
_ROWS = (0.5, 200.0)  # bounds of what is believed
_CACHED_BYTES = 512 * 1024
_SIDE = 512  # of the large product
_WIDTH = 256  # of the thin ones
_THIN, _TALL = 8, 256  # their rows


@dataclass(frozen=True)
class Speeds:
    """What a loop costs on a machine, besides the work itself.

    The figures given here are of one core of a server, for plans that must not depend on the
    machine they are made on.

    Attributes:
        step_s: starting one operation.
        turn_s: one turn of a loop, without its operations.
        bytes_per_s: writing results to memory.
        cached_bytes_per_s: the same where they stay in the cache.
        fresh_bytes_per_s: the same into memory that the system hands out anew.
        flops_per_s: products of large matrices.
        rows: of a product at which half of that speed is reached.
    """

    step_s: float = 4e-6
    turn_s: float = 1e-5
    bytes_per_s: float = 8e9
    cached_bytes_per_s: float = 3e10
    fresh_bytes_per_s: float = 1.5e9
    flops_per_s: float = 7e10
    rows: float = 5.0


def speeds_of(device: torch.device | str = "cpu", cache: Cache | None = None) -> Speeds:
    """The speeds of this machine, measured the first time.

    Where the cache is switched off they are the fixed ones, so that plans do not depend on timings.

    Args:
        cache: default: the one of the environment.
    """
    cache = cache or cache_folder()
    if cache is None:
        return Speeds()
    name = f"speeds-{digest_of(machine_key(device))}.json"
    known = _read(cache, name)
    if known is not None:
        return known
    for _ in range(_MEASUREMENTS):
        found = measure_speeds(device)
        if _is_plausible(found):
            cache.write(name, json.dumps(asdict(found) | {"of": machine_key(device)}, indent=1))
            return found
    return Speeds()


def _is_plausible(speeds: Speeds) -> bool:
    """Whether a measurement shows the machine, not what else it was doing."""
    in_bounds = _ROWS[0] < speeds.rows < _ROWS[1]
    return in_bounds and speeds.cached_bytes_per_s > 1.2 * speeds.bytes_per_s


def _read(cache: Cache, name: str) -> Speeds | None:
    """Speeds from a file; None where there is none or it is not whole."""
    try:
        data = json.loads(cache.read(name) or "")
        del data["of"]
        found = Speeds(**{key: float(value) for key, value in data.items()})
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    values = asdict(found).values()
    whole = len(data) == len(asdict(found)) and all(0 < v < float("inf") for v in values)
    return found if whole else None


def machine_key(device: torch.device | str) -> str:
    """What the speeds depend on: the device, its threads, and torch."""
    device = torch.device(device)
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} {_cpu_model()}"
    return f"{name}; torch {torch.__version__}; {torch.get_num_threads()} threads"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, "") or f"{platform.machine()} {platform.processor()} {platform.node()}"


def measure_speeds(device: torch.device | str = "cpu") -> Speeds:
    """Measure this machine, in well under a second.

    Figures are rounded to two digits; those of one machine differ by a few tenths between tries.
    """
    with torch.no_grad():
        return _Bench(torch.device(device)).speeds()


class _Bench:
    """The measurements. All tensors are float32."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        # process time is right on a busy machine too; of several threads it is a sum
        self._clock = time.process_time if alone else time.perf_counter

    def speeds(self) -> Speeds:
        """All figures."""
        step_s, turn_s = self._step_s(), self._turn_s()
        flops_per_s, rows = self._products(step_s)
        cached = self._write_s(_CACHED_BYTES, tries=12)
        plain = self._write_s(_PLAIN_BYTES, tries=4)
        fresh = self._fresh_s()
        found = Speeds(
            step_s=step_s,
            turn_s=turn_s,
            bytes_per_s=_PLAIN_BYTES / plain,
            cached_bytes_per_s=max(_CACHED_BYTES / cached, _PLAIN_BYTES / plain),
            fresh_bytes_per_s=min(_NEW_BYTES / fresh, _PLAIN_BYTES / plain),
            flops_per_s=flops_per_s,
            rows=rows,
        )
        return Speeds(**{key: float(f"{value:.2g}") for key, value in asdict(found).items()})

    def _least_s(self, run: Callable[[], object], *, tries: int, each: int = 1) -> float:
        """Least time of one call over several tries of ``each`` calls."""
        run()
        times_s = []
        for _ in range(tries):
            self._wait()
            start_s = self._clock()
            for _ in range(each):
                run()
            self._wait()
            times_s.append((self._clock() - start_s) / each)
        return max(min(times_s), 1e-9)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _step_s(self) -> float:
        """An operation on little data, the mean of a few kinds as blocks have them."""
        aten = torch.ops.aten
        x, weight = torch.ones(4, 8, device=self.device), torch.ones(8, 8, device=self.device)

        def steps() -> None:
            y = aten.linear.default(x, weight)
            y = aten.transpose.int(aten.view.default(y, [2, 2, 8]), 0, 1)
            y = aten.cat.default([y, aten.neg.default(y)], -1)
            aten.add.Tensor(aten.mul.Tensor(y, y), y)

        return self._least_s(steps, tries=20, each=5) / 7

    def _turn_s(self) -> float:
        """Taking parts of two inputs and putting a result in its place."""
        x, whole = (torch.ones(8, 4, device=self.device) for _ in range(2))

        def turn() -> None:
            part = x.narrow(0, 1, 1)
            x.narrow(0, 2, 1)
            whole.narrow(0, 1, 1).copy_(part)

        return self._least_s(turn, tries=20, each=20)

    def _write_s(self, nbytes: int, *, tries: int) -> float:
        x = torch.ones(nbytes // 4, device=self.device)
        out = torch.empty_like(x)
        return self._least_s(lambda: torch.add(x, x, out=out), tries=tries)

    def _fresh_s(self) -> float:
        x = torch.ones(_NEW_BYTES // 4, device=self.device)
        return self._least_s(partial(torch.ops.aten.add.Tensor, x, x), tries=4)

    def _products(self, step_s: float) -> tuple[float, float]:
        """Speed of large products, and the rows at which a thin one reaches half of its own."""
        square = torch.ones(_SIDE, _SIDE, device=self.device)
        large_s = self._least_s(partial(torch.mm, square, square), tries=6)
        weight = torch.ones(_WIDTH, _WIDTH, device=self.device)

        def product_s(rows: int) -> float:
            x = torch.ones(rows, _WIDTH, device=self.device)
            linear = partial(torch.ops.aten.linear.default, x, weight)
            return max(self._least_s(linear, tries=20) - step_s, 1e-9)

        thin_s, tall_s = product_s(_THIN), product_s(_TALL)
        # t(rows) = (rows + half) * a
        half = (_THIN * tall_s - _TALL * thin_s) / min(thin_s - tall_s, -1e-9)
        return 2 * _SIDE**3 / large_s, min(max(half, _ROWS[0]), _ROWS[1])


def in_words(speeds: Speeds) -> str:
    """One line for people."""
    return (
        f"writes {speeds.bytes_per_s / 1e9:.3g} GB/s (in the cache "
        f"{speeds.cached_bytes_per_s / 1e9:.3g}, fresh {speeds.fresh_bytes_per_s / 1e9:.3g}), "
        f"products {speeds.flops_per_s / 1e9:.3g} GFLOP/s (half at {speeds.rows:.2g} rows), "
        f"{speeds.step_s * 1e6:.2g} us a step"
    )
