"""Flax models with named axes: one file a family, used as ``spmd_infer.models``."""

if __name__ != "spmd_infer.models":
    raise ImportError(f"this package is 'spmd_infer.models', not {__name__!r}: write 'import spmd_infer.models'")

from spmd_infer.models.registry import FAMILIES, Family, find_family

__all__ = ["FAMILIES", "Family", "find_family"]
