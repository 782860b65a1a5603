"""Two ways to compute a depthwise convolution: XLA's grouped convolution, and the shifted multiply-adds of the zoo.

    python benchmarks/depthwise_conv.py [batch]

prints milliseconds for layers of EfficientNet-Lite0, the best of five, with the activation that follows them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx
from jax import lax

from spmd_infer.models.convolution import DepthwiseConv

# Rows and columns, channels, kernel size, stride.
LAYERS = ((112, 32, 3, 1), (112, 96, 3, 2), (56, 144, 3, 1), (28, 240, 5, 1), (14, 480, 5, 1), (7, 1152, 5, 1))


def grouped(x: jax.Array, weight: jax.Array, stride: int) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        weight,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def milliseconds(fn: Callable[[jax.Array], jax.Array], x: jax.Array) -> tuple[float, jax.Array]:
    compiled = jax.jit(lambda x: jax.nn.relu6(fn(x)))
    result = compiled(x).block_until_ready()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        compiled(x).block_until_ready()
        times.append(time.perf_counter() - began)
    return min(times) * 1e3, result


def main(batch: int) -> None:
    random = np.random.default_rng(0)
    for size, channels, kernel_size, stride in LAYERS:
        x = jax.numpy.asarray(random.standard_normal((batch, size, size, channels), np.float32))
        layer = DepthwiseConv(channels, kernel_size, stride=stride, axis=None, rngs=nnx.Rngs(0))
        ours, found = milliseconds(layer, x)
        theirs, expected = milliseconds(lambda x, w=layer.weight[...], s=stride: grouped(x, w, s), x)
        error = float(abs(found - expected).max())
        print(
            f"[{batch}, {size}, {size}, {channels}] kernel {kernel_size} stride {stride}: grouped {theirs:6.2f} ms, "
            f"shifted {ours:6.2f} ms ({theirs / ours:.1f} times), greatest difference {error:.0e}"
        )


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
