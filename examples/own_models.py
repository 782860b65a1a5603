"""Your own models, with no annotation at all, on eight devices: an NNX module, a Linen module and a plain function."""

import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # devices to play with on a CPU

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import spmd_infer as si

batch = np.random.default_rng(0).normal(size=(10, 256)).astype(np.float32)
dense = nn.Dense(512)
weights = {"w": jnp.ones((256, 512)) / 256, "b": jnp.zeros(512)}
models = {
    "NNX module": (nnx.Linear(256, 512, rngs=nnx.Rngs(0)), None),
    "Linen module": (dense, dense.init(jax.random.key(0), batch)),
    "function": (lambda params, x: x @ params["w"] + params["b"], weights),
}
for name, (model, params) in models.items():
    engine = si.Engine(model, params, mesh="data=4,model=2", example=batch)
    print(f"{name}: {engine.infer(batch).shape}, {engine.plan.notes[0]}")
