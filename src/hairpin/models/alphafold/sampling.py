"""MSA features that AlphaFold-Multimer makes inside the model (Evans et al. 2021, Sec. 7.2).

The monomer's are made by the data pipeline. Dims: s sequences, e extra sequences, r residues.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hairpin.models.alphafold.config import DataConfig
from hairpin.models.alphafold.embedders import deletion_value, one_hot

_LETTERS = 23  # 20 amino acids, unknown, gap, mask
_MASK = 22
_ROWS = ("msa", "deletion_matrix", "msa_mask")
_FAVOUR = 1e6  # added to the first row's logit: it is always chosen


class SampleMSA(nn.Module):
    """Chooses the clustered rows and masks letters of them; the rest are the extra rows.

    ``msa, deletion_matrix, msa_mask`` are ``[n, r]``. Rows are drawn without replacement, the
    first always among them, and every letter is masked or replaced with ``replace_fraction``.
    A batch may have ``bert_mask[n, r]``, 0 where a letter tells nothing, such as where a row has
    no sequence for a chain. Letters there are hidden like others, but need not be predicted.

    Attributes:
        draws: random numbers, in eval too.
    """

    draws = True

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The batch with its rows chosen, ``extra_*`` rows, and ``true_msa, bert_mask[s, r]``.

        ``bert_mask`` is then 1 for the letters that the loss asks for.
        """
        out = split_rows(batch, self._order(batch, generator), self.config)
        return self._mask(out, batch, generator)

    def _order(self, batch: Mapping[str, Tensor], generator: torch.Generator | None) -> Tensor:
        """Rows in random order, empty ones last (Gumbel's trick: sort by logits plus noise)."""
        mask = batch["msa_mask"]
        logits = (mask.sum(-1).clamp(0, 1) - 1) * _FAVOUR
        logits[0] += _FAVOUR
        return (logits + _gumbel(logits, generator)).argsort(descending=True)

    def _mask(
        self,
        out: dict[str, Tensor],
        batch: Mapping[str, Tensor],
        generator: torch.Generator | None,
    ) -> dict[str, Tensor]:
        """Suppl. Sec. 1.2.7 of Jumper et al. 2021: letters replaced, to be predicted."""
        c, msa, mask = self.config, out["msa"], out["msa_mask"]
        probabilities = letter_probabilities(c, batch, msa, mask.dtype)
        logits = (probabilities + 1e-6).log()
        letters = (logits + _gumbel(logits, generator)).argmax(-1)
        chosen = _uniform(mask, generator) < c.replace_fraction
        hidden = chosen.to(mask.dtype) * mask
        replaced = torch.where(hidden > 0, letters, msa) * mask.to(msa.dtype)
        asked = hidden * out["bert_mask"] if "bert_mask" in out else hidden
        return out | {"msa": replaced, "true_msa": msa, "bert_mask": asked}


class FirstRows(nn.Module):
    """Takes the rows as they come and masks nothing: what a reproducible comparison needs."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__()
        self.config = config

    def forward(
        self, batch: Mapping[str, Tensor], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The batch with its first rows, the next as ``extra_*``, and no letter masked."""
        del generator
        rows = torch.arange(len(batch["msa"]), device=batch["msa"].device)
        out = split_rows(batch, rows, self.config)
        return out | {"true_msa": out["msa"], "bert_mask": torch.zeros_like(out["msa_mask"])}


def split_rows(batch: Mapping[str, Tensor], order: Tensor, config: DataConfig) -> dict[str, Tensor]:
    """The batch with the first rows of that order, and the others as ``extra_*``."""
    chosen, rest = order[: config.max_msa_clusters], order[config.max_msa_clusters :]
    return (
        dict(batch)
        | {name: batch[name][chosen] for name in (*_ROWS, "bert_mask") if name in batch}
        | {f"extra_{name}": batch[name][rest] for name in _ROWS}
    )


def letter_probabilities(
    config: DataConfig, batch: Mapping[str, Tensor], msa: Tensor, dtype: torch.dtype
) -> Tensor:
    """What a replaced letter becomes: ``[s, r, 23]``, the last the mask (Suppl. Sec. 1.2.7)."""
    c = config
    mask = batch["msa_mask"]
    letters = one_hot(batch["msa"], _MASK, dtype) * mask[..., None]
    profile = letters.sum(0) / (mask.sum(0) + 1e-10)[:, None]  # [r, 22]
    amino_acid = (torch.arange(_MASK, device=msa.device) < 20).to(dtype) / 20
    kept = c.uniform * amino_acid + c.profile * profile + c.same * one_hot(msa, _MASK, dtype)
    masked = 1 - c.uniform - c.profile - c.same
    return torch.cat([kept, kept.new_full((*kept.shape[:-1], 1), masked)], -1)


def msa_features(batch: Mapping[str, Tensor], config: DataConfig) -> dict[str, Tensor]:
    """The batch with ``target_feat[r, 21]``, ``msa_feat[s, r, 49]`` and extra features."""
    dtype = batch["msa_mask"].dtype
    profile, deletions = cluster_means(batch)
    count = batch["deletion_matrix"]
    extra = batch["extra_deletion_matrix"][: config.max_extra_msa]
    msa_feat = [
        one_hot(batch["msa"], _LETTERS, dtype),
        count.clamp(0, 1)[..., None],
        deletion_value(count)[..., None],
        profile,
        deletion_value(deletions)[..., None],
    ]
    return dict(batch) | {
        "target_feat": one_hot(batch["aatype"], 21, dtype),
        "msa_feat": torch.cat(msa_feat, -1),
        "extra_msa": batch["extra_msa"][: config.max_extra_msa],
        "extra_msa_mask": batch["extra_msa_mask"][: config.max_extra_msa],
        "extra_has_deletion": extra.clamp(0, 1),
        "extra_deletion_value": deletion_value(extra),
    }


def cluster_means(batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Each extra row joins the most similar row (Suppl. Sec. 1.2.7); ties are shared.

    Returns:
        Profiles ``[s, r, 23]`` and mean deletions ``[s, r]`` of the rows with those who joined.
    """
    mask, extra_mask = batch["msa_mask"], batch["extra_msa_mask"]
    rows = one_hot(batch["msa"], _LETTERS, mask.dtype) * mask[..., None]
    extra = one_hot(batch["extra_msa"], _LETTERS, mask.dtype) * extra_mask[..., None]

    letters = _LETTERS - 2  # agreeing on a gap or a mask says nothing
    agreement = torch.einsum("erc,src->se", extra[..., :letters], rows[..., :letters])
    share = (1e3 * agreement).softmax(0) * (mask @ extra_mask.T)  # [s, e]
    count = share.sum(-1) + 1

    profile = (torch.einsum("se,erc->src", share, extra) + rows) / count[:, None, None]
    deletions = share @ (extra_mask * batch["extra_deletion_matrix"]) + batch["deletion_matrix"]
    return profile, deletions / count[:, None]


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(like.shape, generator=generator, dtype=like.dtype, device=device).to(
        like.device
    )


def _gumbel(like: Tensor, generator: torch.Generator | None) -> Tensor:
    uniform = _uniform(like, generator)
    return -(-(uniform + 1e-6).log() + 1e-6).log()
