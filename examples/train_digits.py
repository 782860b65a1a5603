"""Train the small CNN on scikit-learn's handwritten digits, save it, and let the engine read it.

    python examples/train_digits.py digits-cnn

writes ``digits-cnn/config.json`` and ``digits-cnn/model.safetensors``, and prints the accuracy on digits it was not
trained on. Needs scikit-learn (in the ``dev`` extra).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
import numpy.typing as npt
import optax
from flax import nnx
from safetensors.numpy import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from spmd_infer.models.cnn import Config, SmallCNN, name_table
from spmd_infer.tasks.classify import digits_preprocessing

EPOCHS, BATCH = 5, 32


def digits() -> tuple[list[npt.NDArray[np.uint8]], npt.NDArray[np.int64]]:
    """The 1,797 digits as 8×8 pictures, white on black, and what they show."""
    data = load_digits()
    return list((data.images * (255 / 16)).astype(np.uint8)), data.target


def train(images: npt.NDArray[np.float32], labels: npt.NDArray[np.int64], *, seed: int = 0) -> SmallCNN:
    """Fit a SmallCNN to ``images [N, 32, 32, 1]`` by Adam on the cross-entropy."""
    model = SmallCNN(Config(), rngs=nnx.Rngs(seed))
    steps = EPOCHS * (len(images) // BATCH)
    optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(2e-3, steps)), wrt=nnx.Param)

    @nnx.jit
    def step(model: SmallCNN, optimizer: nnx.Optimizer, image: jax.Array, label: jax.Array) -> jax.Array:
        def loss(model: SmallCNN) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model(image), label).mean()

        value, gradients = nnx.value_and_grad(loss)(model)
        optimizer.update(model, gradients)
        return value

    shuffle = np.random.default_rng(seed)
    for epoch in range(EPOCHS):
        order = shuffle.permutation(len(images))[: len(images) // BATCH * BATCH]
        losses = [step(model, optimizer, images[rows], labels[rows]) for rows in order.reshape(-1, BATCH)]
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {np.mean(losses):.4f}")
    return model


def save(model: SmallCNN, folder: Path) -> None:
    """Write the model as a Hugging Face folder, its tensors in PyTorch's layout as the name table says."""
    config = Config()
    parameters = {".".join(map(str, path)): leaf[...] for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    tensors = {}
    for path, source in name_table(config, "safetensors").items():
        array = np.asarray(parameters[path])
        stored = array if source.transpose is None else array.transpose(np.argsort(source.transpose))
        tensors[source.name] = np.ascontiguousarray(stored)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    about = {
        "architectures": ["SmallCNN"],
        "model_type": "small_cnn",
        "image_size": config.image_size,
        "num_channels": config.num_channels,
        "hidden_sizes": list(config.hidden_sizes),
        "pool_size": config.pool_size,
        "id2label": {str(i): str(i) for i in range(config.num_classes)},
    }
    (folder / "config.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def main(folder: Path) -> float:
    """Train, save, read back with the engine, and return the accuracy on the quarter of the digits held back."""
    from spmd_infer.engine import Engine

    pictures, labels = digits()
    training, held_back, training_labels, true = train_test_split(pictures, labels, test_size=0.25, random_state=0)
    began = time.perf_counter()
    model = train(digits_preprocessing(Config())(training), training_labels)
    print(f"trained on {len(training)} digits in {time.perf_counter() - began:.1f} s")
    save(model, folder)
    engine = Engine.load(folder)
    named = [labels[0].name for labels in engine.classify(held_back, top=1)]
    accuracy = float(np.mean(np.asarray(named) == true.astype(str)))
    print(f"read back from {folder}: {accuracy:.1%} of {len(held_back)} other digits named rightly")
    return accuracy


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "digits-cnn"))
