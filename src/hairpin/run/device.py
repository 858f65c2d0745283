"""Where this process computes."""

import os

import torch

from hairpin.comm.mesh import Mesh


def default_device() -> torch.device:
    """The GPU where there is one that torch can use, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of(mesh: Mesh) -> torch.device:
    """Where this rank computes: its GPU where there is one for each rank, else the CPU."""
    if mesh.world == 1:
        return default_device()
    kind = mesh.device_mesh.device_type
    place = f":{os.environ.get('LOCAL_RANK', '0')}" if kind == "cuda" else ""
    return torch.device(kind + place)


def usable_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
