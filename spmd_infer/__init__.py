"""spmd-infer: run any JAX or Flax model sharded over a mesh of devices."""

__version__ = "0.1.0"
