"""The command ``spmd-infer``. Its modules import JAX only when a verb runs, so that ``--help`` answers at once."""

from spmd_infer.cli.app import main

__all__ = ["main"]
