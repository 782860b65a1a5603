"""Weights and images that are the same everywhere: made from a seed and the tensors' names, with numpy alone."""

import zlib
from collections.abc import Mapping

import numpy as np


def seeded_weights(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """Weights for a state dict of these names and shapes (``[out, in, height, width]``), of a size that keeps
    activations near one and batch norms doing something."""
    return {name: _tensor(name, shape) for name, shape in shapes.items()}


def noise(size: int, count: int) -> np.ndarray:
    """``float32 [count, size, size, 3]`` in the range of preprocessed images."""
    return np.random.default_rng(0).uniform(-1, 1, (count, size, size, 3)).astype(np.float32)


def _tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    random = np.random.default_rng(zlib.crc32(name.encode())).uniform(-1, 1, shape)
    if name.endswith("_bn2.weight"):
        # Quiet residual branches: rounding errors then stay as small as they are in a trained network.
        random = 0.2 + 0.1 * random
    elif name.endswith("running_var") or (name.endswith(".weight") and len(shape) == 1):
        random = 1 + 0.5 * random
    elif len(shape) > 1:
        random = random * np.sqrt(6 / np.prod(shape[1:]))
    else:
        random = 0.1 * random
    return random.astype(np.float32)
