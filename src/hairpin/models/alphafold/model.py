"""AlphaFold 2 and AlphaFold-Multimer, whole (Jumper et al. 2021, Suppl. Alg. 2).

Dims: s sequences, r residues (i, j), c channels. MSA ``m[s, r, c_m]``, pair ``z[i, j, c_z]``,
single ``[r, c_s]``. Positions are in Angstrom.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hairpin.errors import DataError
from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.embedders import ExtraMSAEmbedder, InputEmbedder, RecyclingEmbedder
from hairpin.models.alphafold.evoformer import EvoformerStack
from hairpin.models.alphafold.heads import Heads
from hairpin.models.alphafold.primitives import Linear
from hairpin.models.alphafold.sampling import SampleMSA, msa_features
from hairpin.models.alphafold.structure import StructureModule
from hairpin.models.alphafold.templates import (
    MultimerTemplateEmbedder,
    TemplateEmbedder,
    TemplateRows,
)

Batch = Mapping[str, Tensor]

_ATOMS = 37
_CA = 1
_MONOMER = (
    "aatype", "residue_index", "seq_mask", "target_feat", "msa_feat", "msa_mask",
    "extra_msa", "extra_has_deletion", "extra_deletion_value", "extra_msa_mask",
)  # fmt: skip
_MULTIMER = (
    "aatype", "residue_index", "seq_mask", "asym_id", "entity_id", "sym_id",
    "msa", "deletion_matrix", "msa_mask",
)  # fmt: skip
_TEMPLATES = ("template_aatype", "template_all_atom_positions")
_MONOMER_TEMPLATES = (
    "template_all_atom_masks", "template_mask", "template_pseudo_beta", "template_pseudo_beta_mask"
)  # fmt: skip


class Previous(NamedTuple):
    """What one recycle hands to the next; zeros before the first.

    Attributes:
        positions: atoms ``[r, 37, 3]``.
        row: the MSA's first row ``[r, c_m]``.
        pair: the pair representation ``[i, j, c_z]``.
    """

    positions: Tensor
    row: Tensor
    pair: Tensor


class AlphaFold(nn.Module):
    """Features of a protein, or of a complex, to its structure and how sure the model is of it.

    Jumper et al. 2021, Suppl. Alg. 2; with ``config.multimer`` as changed by Evans et al. 2021.
    ``sampling`` chooses the multimer's MSA rows; it may be replaced by `sampling.FirstRows`.
    """

    def __init__(self, config: AlphaFoldConfig) -> None:
        super().__init__()
        self.config = config
        if config.multimer:
            self.sampling: nn.Module = SampleMSA(config.data)
        self.input_embedder = InputEmbedder(config)
        self.recycling_embedder = RecyclingEmbedder(config)
        self.templates = config.template is not None
        if config.template is not None:
            embedder = MultimerTemplateEmbedder if config.multimer else TemplateEmbedder
            self.template_embedder = embedder(config, config.template)
            self.template_rows = TemplateRows(config)
        self.extra_msa_embedder = ExtraMSAEmbedder(config)
        self.extra_msa_stack = EvoformerStack(config.extra_msa, config.extra_msa_blocks)
        self.evoformer = EvoformerStack(config.evoformer, config.evoformer_blocks)
        self.single_activations = Linear(config.c_m, config.c_s)
        self.structure_module = StructureModule(config.structure)
        self.heads = Heads(config)

    def forward(
        self,
        batch: Batch | Sequence[Batch],
        recycles: int | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Run the model ``recycles`` times and once more, which is the answer.

        Only that last time carries gradients (Suppl. Sec. 1.10).

        Args:
            batch: DeepMind's processed features, or one such dict for every time it runs.
            recycles: ``config.recycles`` if left out. With ``config.recycle_tolerance`` fewer may
                be enough.
            generator: draws the multimer's MSA rows and masks.

        Returns:
            ``representations`` (``msa[s, r, c_m]``, ``msa_first_row``, ``pair[i, j, c_z]``,
            ``single[r, c_s]``, ``structure_module[r, c_s]``), ``structure_module``
            (``final_atom_positions[r, 37, 3]`` and more), each head's dict, and ``num_recycles``.

        Raises:
            DataError: a feature is missing, or there are fewer dicts than recycles.
        """
        wanted = self.config.recycles if recycles is None else recycles
        batches = self._prepared(batch, wanted + 1)
        previous = self._start(batches[0])
        done = 0
        while done < wanted:
            with torch.no_grad():  # nothing else of this run outlives it
                after = _handed_on(self.run_once(batches[done], previous, generator))
            done += 1
            settled = self._converged(batches[0], previous, after)
            previous = after
            if settled:
                break
        out = self.run_once(batches[done], previous, generator)
        return out | {"num_recycles": torch.tensor(done)}

    def run_once(
        self, batch: Batch, previous: Previous, generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """One recycle: lines 5 to 26 of Suppl. Alg. 2."""
        if self.config.multimer:
            batch = msa_features(self.sampling(batch, generator), self.config.data)
        pair_mask = batch["seq_mask"][:, None] * batch["seq_mask"][None, :]
        m, z, msa_mask = self._embed(batch, previous, pair_mask)
        m, z = self.evoformer(m, z, msa_mask, pair_mask)
        single = self.single_activations(m[0])

        structure = self.structure_module(single, z, batch["aatype"], batch["seq_mask"])
        representations = {
            "single": single,
            "pair": z,
            "msa": m[: len(batch["msa_feat"])],
            "msa_first_row": m[0],
            "structure_module": structure.pop("act"),
        }
        out = {"representations": representations, "structure_module": structure}
        out |= self.heads(representations)
        if self.config.multimer:
            out["predicted_aligned_error"]["asym_id"] = batch["asym_id"]
            out["masked_msa"] |= {name: batch[name] for name in ("true_msa", "bert_mask")}
        return out

    def _embed(
        self, batch: Batch, previous: Previous, pair_mask: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Lines 5 to 16: ``m[s, r, c_m], z[i, j, c_z], msa_mask[s, r]``, template rows last."""
        m, z = self._from_features(batch, previous)
        if self.templates:
            z = z + self.template_embedder(z, batch, pair_mask)

        extra = self.extra_msa_embedder(batch)
        _, z = self.extra_msa_stack(extra, z, batch["extra_msa_mask"], pair_mask)

        msa_mask = batch["msa_mask"]
        if self.templates:
            rows, rows_mask = self.template_rows(batch)
            m, msa_mask = torch.cat([m, rows]), torch.cat([msa_mask, rows_mask])
        return m, z, msa_mask

    def _from_features(self, batch: Batch, previous: Previous) -> tuple[Tensor, Tensor]:
        """Lines 5 and 6: ``m[s, r, c_m], z[i, j, c_z]``; what they are made of ends here."""
        m, z = self.input_embedder(batch)
        row, pair = self.recycling_embedder(batch["aatype"], *previous)
        return torch.cat([m[:1] + row, m[1:]]), z + pair

    def _start(self, batch: Batch) -> Previous:
        residues = len(batch["aatype"])
        zeros = self.single_activations.weight.new_zeros
        pair = zeros(residues, residues, self.config.c_z)
        return Previous(zeros(residues, _ATOMS, 3), zeros(residues, self.config.c_m), pair)

    def _converged(self, batch: Batch, before: Previous, after: Previous) -> bool:
        """C-alpha distances changed by less than the tolerance (Evans et al. 2021, v2.3 notes)."""
        tolerance = self.config.recycle_tolerance
        if tolerance is None:
            return False
        mask = batch["seq_mask"]
        pair_mask = mask[:, None] * mask[None, :]
        change = (_distances(before.positions) - _distances(after.positions)).square()
        mean = (change * pair_mask).sum() / (pair_mask.sum() + 1e-10)
        return bool((mean + 1e-8).sqrt() <= tolerance)

    def _prepared(self, batch: Batch | Sequence[Batch], times: int) -> list[Batch]:
        """One batch for every time the model runs, in the model's precision."""
        if isinstance(batch, Mapping):
            ready = self._typed(batch)
            return [ready] * times
        if len(batch) < times:
            raise DataError(
                f"{times - 1} recycles need {times} batches of features, one each time the model "
                f"runs, but {len(batch)} were given; give more, or fewer recycles"
            )
        return [self._typed(one) for one in batch[:times]]

    def _typed(self, batch: Batch) -> Batch:
        missing = [name for name in self.needed_features if name not in batch]
        if missing:
            raise DataError(
                f"the batch lacks {', '.join(missing)}, which {self.config.name} needs; make it "
                f"with the pipeline for {'complexes' if self.config.multimer else 'single chains'}"
            )
        dtype = self.single_activations.weight.dtype
        return {
            name: value.to(dtype) if value.is_floating_point() else value
            for name, value in batch.items()
        }

    @property
    def needed_features(self) -> tuple[str, ...]:
        """Names of the features that the model reads."""
        names = _MULTIMER if self.config.multimer else _MONOMER
        if not self.templates:
            return names
        masks = ("template_all_atom_mask",) if self.config.multimer else _MONOMER_TEMPLATES
        return names + _TEMPLATES + masks


def _handed_on(out: dict[str, Any]) -> Previous:
    """The row is copied: as it is, it would keep the whole MSA representation in memory."""
    representations = out["representations"]
    return Previous(
        out["structure_module"]["final_atom_positions"],
        representations["msa_first_row"].clone(),
        representations["pair"],
    )


def _distances(positions: Tensor) -> Tensor:
    """C-alpha distances ``[i, j]`` of atoms ``[r, 37, 3]``."""
    ca = positions[:, _CA]
    return (ca[:, None] - ca[None, :]).square().sum(-1).sqrt()
