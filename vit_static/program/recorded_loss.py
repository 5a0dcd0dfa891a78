"""The training loss, kept in a variable of the program, so that a step needs no result.

Fetching a result copies it to the host, which waits for the device. Written for Paddle 3.3.1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import paddle
from paddle import pir

from vit_static.parallel.dist_values import assign_to
from vit_static.program.ir import FORWARD, operator_role


class RecordedLoss:
    """The losses of the last step's micro-batches on this rank, [num_micro_batches] float32.

    In a pipeline only the last stage has them.
    """

    def __init__(self, num_micro_batches: int) -> None:
        self._num_micro_batches = num_micro_batches
        self._variable_name: str | None = None  # None until a program with a loss records it

    def record(self, program: Any, loss: Any) -> None:
        """Store `loss`, a value of the compiled program, in the variable; each micro-batch runs this once.

        It is the loss [], or the losses of the images [B], of which the mean is stored.

        Earlier losses move up by one place, so after a step the variable holds that step's in order. The variable is
        added when the program has been cut for this rank: before, the engine would average the loss over the ranks.
        """
        num_losses = self._num_micro_batches
        self._variable_name = paddle.utils.unique_name.generate("train_losses")
        with paddle.static.program_guard(program), operator_role(FORWARD):
            pir.reset_insertion_point_to_start()
            variable = paddle._C_ops.data(self._variable_name, [num_losses], loss.dtype, paddle.base.core.Place())
            variable.persistable = True
            pir.set_insertion_point_after(loss.get_defining_op())
            newest = paddle.reshape(paddle.mean(loss) if loss.shape else loss, [1])
            assign_to(variable, newest if num_losses == 1 else paddle.concat([variable[1:], newest]))

    def create(self, place: Any) -> None:
        """Create the variable in the global scope, 0 at first, if this rank's program records the loss."""
        if self._variable_name is not None:
            variable = paddle.static.global_scope().var(self._variable_name)
            variable.get_tensor().set(np.zeros(self._num_micro_batches, np.float32), place)

    def tensor(self) -> Any:
        """Return the variable's tensor, which the next step overwrites, or None where the loss isn't computed."""
        if self._variable_name is None:
            return None
        return paddle.static.global_scope().find_var(self._variable_name).get_tensor()
