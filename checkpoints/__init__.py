"""Reading checkpoints, used as ``spmd_infer.checkpoints``."""

if __name__ != "spmd_infer.checkpoints":
    raise ImportError(
        f"this package is 'spmd_infer.checkpoints', not {__name__!r}: write 'import spmd_infer.checkpoints'"
    )
