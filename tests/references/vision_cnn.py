"""Writes tests/fixtures/vision_cnn.npz: what torch makes of a few digits with the weights of tests/fixtures/digits_cnn.

    python tests/references/vision_cnn.py

Needs torch and safetensors. The weights were made by ``python examples/train_digits.py tests/fixtures/digits_cnn``.
"""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch.nn import functional

FIXTURES = Path(__file__).parents[1] / "fixtures"


@torch.no_grad()
def logits(weights: dict[str, torch.Tensor], images: np.ndarray) -> np.ndarray:
    """Logits ``[B, 10]`` for ``images [B, 32, 32, 1]``."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2)
    x = functional.relu(functional.conv2d(x, weights["conv1.weight"], weights["conv1.bias"], padding=1))
    x = functional.relu(functional.conv2d(x, weights["conv2.weight"], weights["conv2.bias"], padding=1))
    x = functional.max_pool2d(x, 4)
    return functional.linear(x.flatten(1), weights["head.weight"].flatten(1), weights["head.bias"]).numpy()


if __name__ == "__main__":
    noise = np.random.default_rng(0).uniform(0, 1, (4, 32, 32, 1)).astype(np.float32)
    saved = logits(load_file(FIXTURES / "digits_cnn" / "model.safetensors"), noise)
    np.savez_compressed(FIXTURES / "vision_cnn.npz", images=noise, logits=saved)
