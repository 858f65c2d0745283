"""Links that tell what of a transfer is hidden: awaited where it starts, or not made at all.

Each is :meth:`hairpin.comm.transport.Link.exchange` with another body: give it to a subclass, or
patch it in.
"""

from typing import Any

from hairpin.comm.transport import Link, Wait

_exchange = Link.exchange


def at_once(self: Link, *tensors: Any, **about: Any) -> Wait:
    """Await a transfer where it is started."""
    _exchange(self, *tensors, **about)()
    return _nothing


def none(self: Link, *tensors: Any, **about: Any) -> Wait:
    """Move nothing: what is left is the work."""
    del self, tensors, about
    return _nothing


def _nothing() -> None:
    """Done already."""
