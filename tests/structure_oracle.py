"""DeepMind's own outputs for the structure module and the losses, and a module with its weights."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hairpin.models.alphafold.atoms import IdealGeometry, frames_to_atom14, torsions_to_frames
from hairpin.models.alphafold.config import AlphaFoldConfig, LossConfig, StructureModuleConfig
from hairpin.models.alphafold.geometry import Rigid
from hairpin.models.alphafold.primitives import Linear
from hairpin.models.alphafold.structure import StructureModule

ROOT = Path(__file__).parents[1]
FOLDERS = (
    ROOT / "src/hairpin/models/alphafold/oracle",
    ROOT.parent / "shared/data/alphafold_oracle",
)
PREFIX = "alphafold/alphafold_iteration/structure_module"


@cache
def arrays(name: str) -> dict[str, torch.Tensor]:
    """All arrays of an oracle file by name; ``aatype`` as indices."""
    for folder in FOLDERS:
        if (folder / f"{name}.npz").exists():
            with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
                found = {key: torch.tensor(file[key]) for key in file.files}
            return found | {"feat/aatype": found["feat/aatype"].long()}
    pytest.skip(f"{name}.npz is in neither of {', '.join(map(str, FOLDERS))}")


def features(name: str) -> dict[str, torch.Tensor]:
    found = arrays(name).items()
    return {key.removeprefix("feat/"): value for key, value in found if key.startswith("feat/")}


def outputs(name: str) -> dict[str, Any]:
    """The outputs as nested dicts, side chains in our layout."""
    nested: dict[str, Any] = {}
    for key, value in arrays(name).items():
        if key.startswith("out/"):
            *path, leaf = key.split("/")[1:]
            inner = nested
            for part in path:
                inner = inner.setdefault(part, {})
            inner[leaf] = value
    sides = nested["structure_module"].get("sidechains")
    if sides:
        rotation, translation = sides["frames"]["0"], sides["frames"]["1"]
        columns = [rotation[str(i)] for i in range(9)] + [translation[str(i)] for i in range(3)]
        sides["frames"] = torch.stack(columns, dim=-1)
        sides["atom_pos"] = torch.stack([sides["atom_pos"][str(i)] for i in range(3)], dim=-1)
    return nested


def structure_module(name: str) -> StructureModule:
    """Our module with the oracle's parameters, every array used exactly once."""
    multimer = "multimer" in name
    config = StructureModuleConfig(
        c_s=24,
        c_z=16,
        layers=3,
        heads=4,
        sidechain_channels=16,
        position_scale=20.0 if multimer else 10.0,
        multimer=multimer,
    )
    module = StructureModule(config).eval()
    found = {k for k in arrays(name) if k.startswith(f"param/{PREFIX}/")}
    for key, parameter in module.named_parameters():
        parameter.data.copy_(_like("param", name, module, key))
        found.remove(f"param/{_path(module, key)}")
    assert not found, f"not loaded: {sorted(found)}"
    return module


def gradient(name: str, module: StructureModule, key: str) -> torch.Tensor:
    """Of the oracle's loss with respect to one of the module's parameters."""
    return _like("grad", name, module, key)


def head(name: str, layer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of a layer of the pLDDT head."""
    path = f"param/alphafold/alphafold_iteration/predicted_lddt_head/{layer}//"
    if "norm" in layer:
        return arrays(name)[f"{path}scale"], arrays(name)[f"{path}offset"]
    return arrays(name)[f"{path}weights"].T, arrays(name)[f"{path}bias"]


def _like(kind: str, name: str, module: StructureModule, key: str) -> torch.Tensor:
    parameter = module.get_parameter(key)
    value = arrays(name)[f"{kind}/{_path(module, key)}"]
    linear = isinstance(module.get_submodule(key.rpartition(".")[0]), Linear)
    value = value.flatten(1).T if linear and key.endswith("weight") else value
    return value.reshape(parameter.shape)


def _path(module: StructureModule, key: str) -> str:
    owner, _, leaf = key.rpartition(".")
    linear = isinstance(module.get_submodule(owner), Linear)
    names = {"weight": "weights" if linear else "scale", "bias": "bias" if linear else "offset"}
    return f"{PREFIX}/{owner.replace('.', '/')}//{names.get(leaf, leaf)}"


def config(*, aligned_error: bool, multimer: bool = False) -> AlphaFoldConfig:
    """The settings under which the oracle's losses were computed."""
    loss = LossConfig(aligned_error=0.1 if aligned_error else 0.0)
    return AlphaFoldConfig(multimer=multimer, loss=loss)


def built(torsions: torch.Tensor, aatype: torch.Tensor) -> torch.Tensor:
    """Atoms of residues in the identity frame with these torsion angles."""
    ideal = IdealGeometry.of(aatype, torsions)
    r = len(aatype)
    backbone = Rigid(torch.eye(3).to(torsions).expand(r, 3, 3), torch.zeros(r, 3).to(torsions))
    sin_cos = torch.stack([torsions.sin(), torsions.cos()], dim=-1)
    return frames_to_atom14(ideal, torsions_to_frames(ideal, backbone, sin_cos))
