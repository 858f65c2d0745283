"""Seeing the calls of one function of torch while some code runs."""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

from torch.overrides import TorchFunctionMode


class Watching(TorchFunctionMode):
    """In this context :meth:`instead` answers the calls of ``function``.

    Attributes:
        function: of torch; names: of its arguments, in their order.
    """

    function: ClassVar[Callable[..., Any]]
    names: ClassVar[tuple[str, ...]]

    @abstractmethod
    def instead(self, call: dict[str, Any], usual: Callable[[], Any]) -> Any:
        """The result of a call with these arguments; ``usual`` gives torch's."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        usual = partial(func, *args, **(kwargs or {}))
        if func is not type(self).function:  # which is bound on an object
            return usual()
        call = dict(zip(self.names, args, strict=False)) | dict(kwargs or {})
        return self.instead(call, usual)
