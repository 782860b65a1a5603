"""Reading checkpoints, used as ``spmd_infer.checkpoints``."""

if __name__ != "spmd_infer.checkpoints":
    raise ImportError(
        f"this package is 'spmd_infer.checkpoints', not {__name__!r}: write 'import spmd_infer.checkpoints'"
    )

from spmd_infer.checkpoints.formats import Format, open_checkpoint
from spmd_infer.checkpoints.loading import load_onto, unused_tensors
from spmd_infer.checkpoints.reader import Index, Reader, TensorInfo

__all__ = ["Format", "Index", "Reader", "TensorInfo", "load_onto", "open_checkpoint", "unused_tensors"]
