"""A flow whose operations over windows are spelled out for a mesh: edges cut, sent, and put around a device's part.

That is what ``spmd_infer.models.halo`` does, and what XLA then makes of it: what precedes the convolution is computed
inside each edge and inside the completed part, while it stays in memory itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod

import numpy as np

from spmd_infer.planning.flow import Flow, Op
from spmd_infer.planning.messages import Completion
from spmd_infer.planning.values import Value, Window

Complete = Callable[[Window], Completion]
Size = Callable[[int], int]


def spelled_out(flow: Flow, size: Size, complete: Complete) -> tuple[Flow, Size]:
    """The flow with every window as cuts, collectives and what joins them.

    Args:
        flow: the step.
        size: bytes on a device of each of its values.
        complete: what a window needs on this mesh.

    Returns:
        The flow, and the sizes of its values.
    """
    writer = _Writer(flow, size)
    for op in flow.ops:
        if op.kind == "window" and op.inputs and isinstance(op.item, Window):
            writer.window(op, complete(op.item))
        elif op.kind == "move" and op.outputs and flow.padded.get(op.outputs[0]) in writer.whole:
            writer.pad(op)
        else:
            writer.ops.append(op)
    return replace(flow, values=tuple(writer.values), ops=tuple(writer.ops)), writer.size


class _Writer:
    def __init__(self, flow: Flow, size: Size) -> None:
        self._flow, self._before = flow, size
        self.values, self.ops = list(flow.values), list[Op]()
        self.whole: dict[int, Completion] = {}  # completed operands by number
        self._sizes: dict[int, int] = {}

    def size(self, value: int) -> int:
        own = self._sizes.get(value)
        return self._before(value) if own is None else own

    def window(self, op: Op, needed: Completion) -> None:
        """A window's operand, brought together or completed by edges."""
        (source,), (result,) = op.inputs, op.outputs
        self.whole[result] = needed
        for _, nbytes in needed.gathered:
            source = self._sent(source, nbytes)
        if not needed.edges:
            self.ops.append(Op("constraint", (source,), (result,)))
            return
        pieces: tuple[int, ...] = (source,)
        for _, edges in needed.edges:
            cut = [self._value(nbytes) for nbytes in edges]
            self.ops += [Op("move", pieces, (edge,), twice=True) for edge in cut]
            pieces += tuple(self._sent(edge, nbytes) for edge, nbytes in zip(cut, edges, strict=True))
        self._sizes[result] = prod(needed.shape) * np.dtype(self.values[result].dtype).itemsize
        self.ops.append(Op("move", pieces, (result,), twice=True))

    def pad(self, op: Op) -> None:
        """Zeros around a completed operand, where it has no edges."""
        (result,), inner = op.outputs, self._flow.padded[op.outputs[0]]
        needed, value, within = self.whole[inner], self.values[result], self.values[inner]
        added = [
            0 if d in needed.completed else padded - size
            for d, (padded, size) in enumerate(zip(value.shape, within.shape, strict=True))
        ]
        shape = [size + zeros for size, zeros in zip(needed.shape, added, strict=True)]
        self._sizes[result] = prod(shape) * np.dtype(value.dtype).itemsize
        self.ops.append(op if any(added) else Op("constraint", op.inputs[:1], op.outputs))

    def _sent(self, value: int, nbytes: int) -> int:
        """What a collective makes of a value."""
        result = self._value(nbytes)
        self.ops.append(Op("collective", (value,), (result,)))
        return result

    def _value(self, nbytes: int) -> int:
        self.values.append(Value((nbytes,), np.int8, (None,)))
        self._sizes[len(self.values) - 1] = nbytes
        return len(self.values) - 1
