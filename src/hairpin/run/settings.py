"""Recipes as plain data, for checkpoints and reports, and what may differ when a run goes on."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from hairpin.errors import CheckpointError

Recipe = TypeVar("Recipe")

# Settings that change neither the weights nor the loss curve: a resumed run may have others.
FREE_SETTINGS = (
    "name", "checkpoint_every", "validate_every", "validation_examples", "sample_steps",
    "frames_per_pass", "guidance",
)  # fmt: skip


def to_plain(recipe: Any) -> dict[str, Any]:
    """A recipe as nested dicts that JSON can hold."""
    return dataclasses.asdict(recipe)


def from_plain(kind: type[Recipe], data: Mapping[str, Any]) -> Recipe:
    """The recipe that :func:`to_plain` wrote.

    Raises:
        CheckpointError: a setting is missing or surplus.
    """
    hints = get_type_hints(kind)
    try:
        return kind(**{name: _value(hints.get(name), value) for name, value in data.items()})
    except TypeError as error:
        raise CheckpointError(
            f"the saved settings are not those of a {kind.__name__}: {error}; "
            "use the version of Hairpin that saved them"
        ) from error


def _value(hint: Any, value: Any) -> Any:
    for kind in (hint, *get_args(hint)):  # the second for a setting that may be None
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
            return from_plain(kind, value)
    return tuple(value) if get_origin(hint) is tuple else value


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every setting."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, list(value) if isinstance(value, tuple) else value


def require_same(recipe: Any, saved: Mapping[str, Any]) -> None:
    """Raise unless a run with ``recipe`` may go on from a checkpoint with the ``saved`` settings.

    Raises:
        CheckpointError: naming each setting that differs and matters.
    """
    ours, theirs = dict(flat(to_plain(recipe))), dict(flat(saved))
    names = [name for name in ours | theirs if name not in FREE_SETTINGS]
    differing = [name for name in names if ours.get(name) != theirs.get(name)]
    if differing:
        lines = [f"{n}: saved {theirs.get(n)!r}, asked for {ours.get(n)!r}" for n in differing]
        raise CheckpointError(
            "this checkpoint was made with other settings, so the run cannot go on from it "
            f"({'; '.join(lines)}); leave these settings as saved, or start a new run"
        )
