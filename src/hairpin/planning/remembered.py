"""Plans kept in the cache folder, so that the same question is answered without a search."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from hairpin.errors import PlanError
from hairpin.planning.cache import cache_folder, digest_of
from hairpin.planning.identity import identity
from hairpin.planning.plan import Plan


@dataclass(frozen=True, eq=False)
class Origin:
    """Where a plan from the cache comes from.

    Attributes:
        drop: takes it out of the cache.
        again: makes it anew, with its graphs.
    """

    drop: Callable[[], None]
    again: Callable[[], Plan]

    def __deepcopy__(self, memo: Any) -> "Origin":
        return self

    def __reduce__(self) -> tuple[Any, tuple[()]]:
        return type(None), ()  # a plan that is sent to another process is one from a file


def remembered(
    make: Callable[[], Plan],
    model: nn.Module,
    *arguments: Any,
    say: Callable[[str], None],
) -> Plan:
    """The plan that ``make`` gives for these arguments, from the cache if it is there.

    What was kept counts only if the model's code, settings, shapes and modes, the example, the
    arguments and all versions are the same. Otherwise, and where something has no name that
    another process would find again, the plan is made.
    """
    cache = cache_folder()
    name = None if cache is None else identity(model, *arguments)
    if cache is None or name is None:
        return make()
    file = f"plan-{name}.toml"
    found = _plan(cache.read(file))
    if found is not None:
        say("from the cache")
        return replace(found, origin=Origin(partial(cache.drop, file), make))
    made = make()
    text = made.to_toml()
    cache.write(file, f"# {digest_of(text)}\n{text}")
    return made


def _plan(text: str | None) -> Plan | None:
    """A plan from a file of the cache; None where it is absent or not as it was written."""
    head, _, body = (text or "").partition("\n")
    if head != f"# {digest_of(body)}":
        return None
    try:
        return Plan.from_toml(body)
    except PlanError:
        return None
