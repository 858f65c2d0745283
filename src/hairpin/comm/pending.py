"""A transfer that has been started and not yet awaited."""

from collections.abc import Callable

import torch
from torch import Tensor

from hairpin.comm.eager import eager


class Pending:
    """Handle of a started transfer. ``wait()`` gives its result, once or many times.

    The gradient runs the same way back: the backward of ``wait`` starts the transposed transfer
    and the backward of the verb awaits it, so work between the two overlaps in both directions.
    """

    def __init__(self, finish: Callable[[], Tensor]) -> None:
        self._finish: Callable[[], Tensor] | None = finish
        self._grad_enabled = torch.is_grad_enabled()
        self._result: Tensor | None = None

    @eager
    def wait(self) -> Tensor:
        """The transferred tensor.

        Raises:
            CommError: a rank is gone or did not answer before the mesh's deadline.
        """
        if self._finish is not None:
            with torch.set_grad_enabled(self._grad_enabled):
                self._result = self._finish()
            self._finish = None
        assert self._result is not None
        return self._result
