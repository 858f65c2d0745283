"""Every error Hairpin raises on purpose, under one root.

A message says what was got, what is wrong with it, and what to do.
"""


class HairpinError(Exception):
    """Root of all errors that Hairpin raises on purpose."""


class UnitError(HairpinError, ValueError):
    """A quantity written as text could not be read, such as ``memory="2 apples"``."""


class LayoutError(HairpinError, ValueError):
    """A layout pattern, its sizes, or a tensor that should follow it are wrong."""


class SequenceError(HairpinError, ValueError):
    """Attention along a split sequence was asked for in a way that cannot be right."""


class MeshError(HairpinError, ValueError):
    """A mesh does not fit the processes there are, or an axis is not on the mesh."""


class PlanError(HairpinError, ValueError):
    """A plan cannot be made, read, or applied to this model."""


class SplitError(PlanError):
    """A module computes along a dim that the plan splits there, so the result would be wrong."""


class TraceError(PlanError):
    """A block cannot be exported as a graph, or is called in a way its graph does not hold for."""


class CommError(HairpinError, RuntimeError):
    """A transfer between ranks failed: a rank is gone, or did not answer in time."""


class DisagreementError(CommError):
    """The ranks were given different inputs, plans or modes, so they must not go on together."""


class RankFailed(HairpinError, RuntimeError):
    """A local rank raised an error or was killed."""


class CheckpointError(HairpinError, RuntimeError):
    """A checkpoint is missing, corrupt, or belongs to another model or recipe."""


class RecipeError(HairpinError, ValueError):
    """A training recipe has a setting that cannot work."""


class DataError(HairpinError, ValueError):
    """Input data are missing or malformed."""


class FoldInputError(HairpinError, ValueError):
    """A target, alignment, template or structure to fold or score from cannot be used."""


class WeightsError(HairpinError, ValueError):
    """A model's parameters are missing, or are not those of this model."""


class OutputError(HairpinError, OSError):
    """An output folder or file cannot be written."""


class MissingExtraError(HairpinError, ImportError):
    """An optional dependency is needed and absent."""


class NumericsError(HairpinError, ArithmeticError):
    """Training met a value that is not finite."""


class MemoryBudgetError(HairpinError, RuntimeError):
    """More bytes are needed than the budget allows.

    Attributes:
        floor_bytes: the least budget that could be met, 0 where it is not known.
    """

    floor_bytes: int = 0
