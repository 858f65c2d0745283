"""How much of a protein's alignments and templates a model sees."""

from dataclasses import asdict, dataclass

from hairpin.errors import RecipeError
from hairpin.proteins.msa import Masking


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How many sequences and templates a model sees, and how the MSA is masked.

    Jumper et al. 2021, Suppl. Sec. 1.2.

    Attributes:
        max_msa_clusters: rows of the clustered MSA, template rows included where
            ``clusters_hold_templates``.
        max_extra_msa: rows of the extra MSA.
        max_templates: 0 for a model without templates.
        replace_fraction: part of the MSA's letters that is masked or replaced.
        uniform, profile, same: what a replaced letter becomes; the rest is the mask.
        crop_size: residues of a training crop; None for no crop.
    """

    max_msa_clusters: int = 512
    max_extra_msa: int = 1024
    max_templates: int = 0
    clusters_hold_templates: bool = False
    replace_fraction: float = 0.15
    uniform: float = 0.1
    profile: float = 0.1
    same: float = 0.1
    crop_size: int | None = None

    @property
    def masking(self) -> Masking:
        """The part of it that masks letters."""
        return Masking(self.replace_fraction, self.uniform, self.profile, self.same)

    @property
    def clusters(self) -> int:
        """Rows of the clustered MSA without those of templates."""
        return self.max_msa_clusters - self.clusters_hold_templates * self.max_templates


@dataclass(frozen=True, kw_only=True)
class Sizes(DataConfig):
    """What the pipeline makes for a model: its settings, and a batch for every recycle.

    Attributes:
        recycles: times the model runs before the last.

    Raises:
        RecipeError: no row is left for clusters, or a size is none.
    """

    recycles: int = 3

    def __post_init__(self) -> None:
        if self.clusters < 1 or (self.crop_size or 1) < 1 or self.recycles < 0:
            raise RecipeError(
                f"{self.clusters} rows of MSA clusters, crop_size {self.crop_size}, recycles "
                f"{self.recycles}: at least one cluster row must be left beside the templates' "
                "rows, a crop has a residue or more, and recycles are 0 or more"
            )

    @staticmethod
    def of(data: DataConfig, *, recycles: int) -> "Sizes":
        """A model's settings with a number of recycles.

        Raises:
            RecipeError: as of the class.
        """
        return Sizes(**{**asdict(data), "recycles": recycles})
