"""The heads on the trunk's representations (Jumper et al. 2021, Suppl. Sec. 1.9.6 to 1.9.10).

Dims: s sequences, r residues (i, j), c channels. Each head returns a dict of what it predicts, its
``logits`` first; the losses read the same dict.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.models.alphafold.config import AlphaFoldConfig, HeadsConfig
from hairpin.models.alphafold.primitives import Linear

_ATOMS = 37


class PredictedLDDTHead(nn.Module):
    """Suppl. Alg. 29: ``single[r, c_s] -> logits[r, 50]`` of the model's own lDDT-Ca."""

    def __init__(self, c_s: int, config: HeadsConfig) -> None:
        super().__init__()
        self.input_layer_norm = nn.LayerNorm(c_s)
        self.act_0 = Linear(c_s, config.plddt_channels, init="relu")
        self.act_1 = Linear(config.plddt_channels, config.plddt_channels, init="relu")
        self.logits = Linear(config.plddt_channels, config.plddt_bins, init="final")

    def forward(self, single: Tensor) -> dict[str, Tensor]:
        """The structure module's ``single[r, c_s]`` to ``logits[r, 50]``."""
        h = F.relu(self.act_0(self.input_layer_norm(single)))
        return {"logits": self.logits(F.relu(self.act_1(h)))}


class PredictedAlignedErrorHead(nn.Module):
    """Suppl. Sec. 1.9.7: ``z[i, j, c_z] -> logits[i, j, 64]`` of the error at j aligned on i."""

    def __init__(self, c_z: int, config: HeadsConfig) -> None:
        super().__init__()
        self.max_error = config.max_error
        self.bins = config.error_bins
        self.logits = Linear(c_z, config.error_bins, init="final")

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """``z[i, j, c_z]`` to ``logits[i, j, 64]`` and ``breaks[63]`` in Angstrom."""
        breaks = torch.linspace(0, self.max_error, self.bins - 1, dtype=z.dtype, device=z.device)
        return {"logits": self.logits(z), "breaks": breaks}


class DistogramHead(nn.Module):
    """Suppl. Sec. 1.9.8: ``z[i, j, c_z] -> logits[i, j, 64]`` of the C-beta distance, symmetric."""

    def __init__(self, c_z: int, config: HeadsConfig) -> None:
        super().__init__()
        self.range = config.first_break, config.last_break
        self.bins = config.distogram_bins
        self.half_logits = Linear(c_z, config.distogram_bins, init="final")

    def forward(self, z: Tensor) -> dict[str, Tensor]:
        """``z[i, j, c_z]`` to ``logits[i, j, 64]`` and ``bin_edges[63]`` in Angstrom."""
        half = self.half_logits(z)
        edges = torch.linspace(*self.range, self.bins - 1, dtype=z.dtype, device=z.device)
        return {"logits": half + half.transpose(0, 1), "bin_edges": edges}


class LogitsHead(nn.Module):
    """One linear layer: masked MSA (Sec. 1.9.9), experimentally resolved atoms (Sec. 1.9.10)."""

    def __init__(self, c: int, classes: int) -> None:
        super().__init__()
        self.logits = Linear(c, classes, init="final")

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """``x[..., c]`` to ``logits[..., classes]``."""
        return {"logits": self.logits(x)}


class Heads(nn.Module):
    """All heads but the structure module, which is one in the paper too."""

    def __init__(self, config: AlphaFoldConfig) -> None:
        super().__init__()
        heads = config.heads
        self.predicted_lddt = PredictedLDDTHead(config.c_s, heads)
        self.distogram = DistogramHead(config.c_z, heads)
        self.masked_msa = LogitsHead(config.c_m, heads.masked_msa_classes)
        self.experimentally_resolved = LogitsHead(config.c_s, _ATOMS)
        if heads.aligned_error:
            self.predicted_aligned_error = PredictedAlignedErrorHead(config.c_z, heads)

    def forward(self, representations: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """What each head says of ``msa``, ``pair``, ``single`` and ``structure_module``."""
        out = {
            "distogram": self.distogram(representations["pair"]),
            "masked_msa": self.masked_msa(representations["msa"]),
            "predicted_lddt": self.predicted_lddt(representations["structure_module"]),
            "experimentally_resolved": self.experimentally_resolved(representations["single"]),
        }
        if hasattr(self, "predicted_aligned_error"):
            out["predicted_aligned_error"] = self.predicted_aligned_error(representations["pair"])
        return out
