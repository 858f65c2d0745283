"""``hairpin doctor``: what this machine can run, and why not the rest.

Each ``examine_*`` looks at one topic and returns its findings; none changes anything.
"""

import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated

import typer

import hairpin
from hairpin.cli.output import print_json, stdout
from hairpin.units import format_bytes


@dataclass(frozen=True)
class Finding:
    """One thing that is there or not: ``detail`` says what or why not, ``remedy`` how to get it."""

    topic: str
    name: str
    present: bool
    detail: str
    remedy: str | None = None


def doctor(
    *,
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Say which devices, links, back ends and extras are here, and why each absent one is not."""
    findings = examine()
    if json:
        print_json({"hairpin": hairpin.__version__, "findings": [asdict(f) for f in findings]})
    else:
        print_findings(findings)


def examine() -> list[Finding]:
    """All findings, topic by topic."""
    return [
        *examine_software(),
        *examine_devices(),
        *examine_kernels(),
        *examine_flash_attn(),
        *examine_backends(),
        *examine_links(),
        *examine_extras(),
        *examine_bench(),
    ]


def print_findings(findings: list[Finding]) -> None:
    """Write the findings to stdout as one table."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for heading in ("topic", "what", "", "found, or why not"):
        table.add_column(heading, no_wrap=heading != "found, or why not")
    topic = None
    for finding in findings:
        mark = Text("yes", "green") if finding.present else Text("no", "yellow")
        lines = (
            finding.detail if finding.remedy is None else f"{finding.detail}\n-> {finding.remedy}"
        )
        table.add_row(
            finding.topic if finding.topic != topic else "", finding.name, mark, Text(lines)
        )
        topic = finding.topic
    stdout().print(table)


def examine_software() -> Iterator[Finding]:
    """Python, torch, and the compilers that torch can use."""
    import torch

    yield Finding("software", "python", True, f"{platform.python_version()} ({sys.executable})")
    yield Finding("software", "torch", True, torch.__version__)
    compiler = next(
        filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "clang++"))), None
    )
    yield Finding(
        "software",
        "torch.compile on CPU",
        compiler is not None,
        compiler or "no C++ compiler on the path",
        None if compiler else "install g++ or clang++, or name one in CXX",
    )
    yield _triton(torch.version.cuda)


def _triton(cuda: str | None) -> Finding:
    if find_spec("triton") is not None:
        return Finding("software", "triton", True, metadata.version("triton"))
    why = "it comes with torch builds for CUDA; this build is for CPU" if cuda is None else "absent"
    remedy = None if cuda is None else "pip install triton"
    return Finding("software", "triton", False, why, remedy)


def examine_devices() -> Iterator[Finding]:
    """CPU, CUDA devices, Apple's GPU."""
    import torch

    yield Finding("devices", "cpu", True, _describe_cpu(torch.get_num_threads()))
    yield _speeds()
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            detail = f"{device.name}, {format_bytes(device.total_memory)}"
            yield Finding("devices", f"cuda:{index}", True, detail)
    elif torch.version.cuda is None:
        why = f"torch {torch.__version__} is built without CUDA"
        yield Finding(
            "devices", "cuda", False, why, "with an NVIDIA GPU: install a CUDA build of torch"
        )
    else:
        why = f"torch is built for CUDA {torch.version.cuda}, but no GPU or driver answers"
        yield Finding("devices", "cuda", False, why, "check nvidia-smi and CUDA_VISIBLE_DEVICES")
    yield _mps(built=torch.backends.mps.is_built(), available=torch.backends.mps.is_available())


def _describe_cpu(threads: int) -> str:
    from hairpin.run.device import usable_cores

    cores = usable_cores()
    detail = f"{cores} cores, torch uses {threads} threads"
    try:
        memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):  # not told on this system
        return detail
    return f"{detail}, {format_bytes(memory_bytes)} memory"


def _speeds() -> Finding:
    """What the choice of loops weighs; measured the first time, then read from the cache."""
    from hairpin.planning.cache import VARIABLE, cache_folder
    from hairpin.planning.speeds import in_words, speeds_of

    cache = cache_folder()
    where = f"cache off ({VARIABLE}): fixed speeds" if cache is None else f"in {cache.folder}"
    return Finding("devices", "speeds", True, f"{in_words(speeds_of())}; {where}")


def _mps(*, built: bool, available: bool) -> Finding:
    if available:
        return Finding("devices", "mps", True, "Apple GPU")
    why = (
        "torch sees no Apple GPU here"
        if built
        else f"only on Apple machines; this is {sys.platform}"
    )
    return Finding("devices", "mps", False, why)


def examine_kernels() -> Iterator[Finding]:
    """Whether the Triton kernels compute on this machine, or torch's own operations."""
    import torch

    from hairpin import kernels
    from hairpin.kernels.choice import why_not_here

    functions = [name for name in kernels.__all__ if name.islower()]
    names = f"{', '.join(functions[:-1])} and {functions[-1]}"
    why = why_not_here() if torch.cuda.is_available() else "no CUDA device"
    if why is None:
        detail = f"{names} run in Triton on CUDA tensors of float32, float16 and bfloat16"
        yield Finding("kernels", "in Triton", True, detail)
        return
    remedy = None
    if why == "Triton is not installed":
        remedy = 'pip install "hairpin[triton]"'
    detail = f"{why}; {names} are torch's own operations, with the same results"
    yield Finding("kernels", "in Triton", False, detail, remedy)


def examine_flash_attn() -> Iterator[Finding]:
    """Whether the package flash-attn computes attention across ranks, and why not."""
    import torch

    from hairpin.exchange.flash import why_not

    why = why_not()
    if why is None and torch.cuda.is_available():
        detail = "computes causal and window attention across ranks in half precision on CUDA"
        yield Finding("kernels", "flash-attn", True, detail)
        return
    remedy = None if why is None else "pip install 'flash-attn>=2.7', which builds for this torch"
    instead = "torch's own kernels and ours compute"
    yield Finding("kernels", "flash-attn", False, f"{why or 'no CUDA device'}; {instead}", remedy)


def examine_backends() -> Iterator[Finding]:
    """The transports of torch.distributed that Hairpin uses: Gloo and NCCL."""
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        why = f"torch {torch.__version__} is built without torch.distributed"
        yield Finding("back ends", "gloo, nccl", False, why, "install another build of torch")
        return
    gloo = dist.is_gloo_available()
    detail = "for CPU tensors" if gloo else "not in this build of torch"
    yield Finding("back ends", "gloo", gloo, detail)
    yield _nccl(built=dist.is_nccl_available(), gpu=torch.cuda.is_available())


def _nccl(*, built: bool, gpu: bool) -> Finding:
    import torch

    if built and gpu:
        version = ".".join(map(str, torch.cuda.nccl.version()))
        return Finding("back ends", "nccl", True, f"{version}, for CUDA tensors")
    why = (
        "not in this build of torch: NCCL needs CUDA" if not built else "there is no GPU to use it"
    )
    return Finding("back ends", "nccl", False, why, "ranks on CPU use gloo")


def examine_links() -> Iterator[Finding]:
    """How ranks on this machine reach one another."""
    import torch

    yield _loopback()
    count = torch.cuda.device_count()
    if count < 2:
        yield Finding("links", "GPU to GPU", False, f"needs 2 GPUs, there are {count}")
        return
    pairs = [(i, j) for i in range(count) for j in range(count) if i != j]
    direct = sum(torch.cuda.can_device_access_peer(i, j) for i, j in pairs)
    detail = f"{direct} of {len(pairs)} ordered pairs of {count} GPUs reach each other's memory"
    yield Finding("links", "GPU to GPU", direct > 0, detail)


def _loopback() -> Finding:
    try:
        with (
            socket.create_server(("127.0.0.1", 0)) as server,
            socket.create_connection(server.getsockname(), timeout=2),
        ):
            return Finding(
                "links", "loopback", True, "ranks on this machine can connect (127.0.0.1)"
            )
    except OSError as error:
        why = f"no connection to 127.0.0.1: {error}"
        return Finding("links", "loopback", False, why, "bring the interface up: ip link set lo up")


def examine_extras() -> Iterator[Finding]:
    """The extras that the installed package declares, read from its own metadata."""
    try:
        requirements = metadata.requires("hairpin") or []
    except metadata.PackageNotFoundError:
        why = "hairpin runs from a folder and is not installed, so its extras are not known"
        yield Finding("extras", "all", False, why, "pip install --editable .")
        return
    for extra, packages in group_by_extra(requirements).items():
        versions = {package: _version(package) for package in packages}
        missing = [package for package, version in versions.items() if version is None]
        found = ", ".join(f"{p} {v}" for p, v in versions.items() if v is not None)
        yield Finding(
            "extras",
            extra,
            not missing,
            f"not installed: {', '.join(missing)}" if missing else found,
            f'pip install "hairpin[{extra}]"' if missing else None,
        )


def group_by_extra(requirements: list[str]) -> dict[str, list[str]]:
    """Names of packages by extra, from lines such as ``pillow>=10; extra == 'video'``."""
    extras: dict[str, list[str]] = {}
    for line in requirements:
        match = re.match(r"([\w.-]+).*;.*\bextra\s*==\s*['\"]([\w-]+)['\"]", line)
        if match is not None:
            extras.setdefault(match[2], []).append(match[1])
    return extras


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def examine_bench() -> Iterator[Finding]:
    """Whether the benchmarks can emulate slow links here."""
    from hairpin.bench.network import why_not

    obstacle = why_not()
    if obstacle is None:
        detail = "bench runs ranks in network namespaces with limited rates"
        yield Finding("bench", "emulated network", True, detail)
    else:
        yield Finding(
            "bench", "emulated network", False, obstacle, "bench uses the loopback instead"
        )
