"""EfficientNet-Lite, variants lite0 to lite4: an image classifier of inverted-residual blocks.

Tan and Le 2019, "EfficientNet: Rethinking Model Scaling for Convolutional Neural Networks"; the Lite variants leave
out squeeze-and-excitation, use ReLU6 in place of swish, and keep the stem, the head, and the number of first and last
blocks fixed while width and depth scale. Batch norms use the statistics of training; there is no dropout.

Split over the model axis, a block is a feed-forward block (Megatron): its expanded channels are split, the depthwise
convolution works on each device's own channels, and the projection back contracts them, one all-reduce a block. The
head's channels are split as well; averaged over the image they are gathered (a few kB), and the classes are split.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_infer.axes import BATCH, CHANNELS, EMBED, HEIGHT, MLP, VOCAB, WIDTH, constrain
from spmd_infer.errors import ModelError
from spmd_infer.models.convolution import BatchNorm, Conv, DepthwiseConv
from spmd_infer.models.layers import Linear
from spmd_infer.tensors import InputSpec, Source

STEM, HEAD = 32, 1280
# Blocks, kernel size, stride of the first block, expansion, output channels; before scaling.
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
# Width, depth, image size.
VARIANTS: Mapping[str, tuple[float, float, int]] = {
    "lite0": (1.0, 1.0, 224),
    "lite1": (1.0, 1.1, 240),
    "lite2": (1.1, 1.2, 260),
    "lite3": (1.2, 1.4, 280),
    "lite4": (1.4, 1.8, 300),
}


@dataclass(frozen=True)
class BlockSizes:
    """Sizes of one inverted-residual block: channels in, expanded, out; kernel size; stride."""

    inputs: int
    hidden: int
    outputs: int
    kernel_size: int
    stride: int


@dataclass(frozen=True)
class Config:
    """Sizes of an EfficientNet-Lite.

    Attributes:
        width: factor on the channels of the stages.
        depth: factor on the number of blocks.
        image_size: rows and columns of the input.
        num_classes: size of the classifier.
        norm_epsilon: epsilon of the batch norms.
    """

    width: float = 1.0
    depth: float = 1.0
    image_size: int = 224
    num_classes: int = 1000
    norm_epsilon: float = 1e-3

    @classmethod
    def variant(cls, name: str, num_classes: int = 1000) -> Config:
        """The configuration of ``lite0`` … ``lite4``."""
        if name not in VARIANTS:
            raise ModelError(f"EfficientNet-Lite has no variant {name!r}; known are {', '.join(VARIANTS)}")
        width, depth, image_size = VARIANTS[name]
        return cls(width, depth, image_size, num_classes)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Read the keys that Hugging Face uses for EfficientNet: ``width_coefficient``, ``image_size``, …."""
        base = cls()
        return cls(
            width=float(config.get("width_coefficient", base.width)),
            depth=float(config.get("depth_coefficient", base.depth)),
            image_size=int(config.get("image_size", base.image_size)),
            num_classes=int(config.get("num_labels") or len(config.get("id2label") or ()) or base.num_classes),
            norm_epsilon=float(config.get("batch_norm_eps", base.norm_epsilon)),
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Config | None:
        """The variant whose tensors these are (names and shapes both), or None.

        Args:
            shapes: shape of each stored tensor, in the names of the PyTorch ports, convolutions ``[out, in, h, w]``.
        """
        classes = shapes.get("_fc.weight", ())
        if len(classes) != 2:
            return None
        for name in VARIANTS:
            config = cls.variant(name, num_classes=classes[0])
            if (
                _stored_shapes(config).items()
                == {k: v for k, v in shapes.items() if not k.endswith(".num_batches_tracked")}.items()
            ):
                return config
        return None

    def axis_units(self) -> Mapping[str, int]:
        """Every channel stands for itself."""
        return {}

    def blocks(self) -> tuple[BlockSizes, ...]:
        """Sizes of the blocks, in order."""
        blocks: list[BlockSizes] = []
        inputs = STEM
        for position, (repeats, kernel_size, stride, expansion, channels) in enumerate(STAGES):
            outputs = _round_channels(channels * self.width)
            fixed = position in (0, len(STAGES) - 1)
            for repeat in range(repeats if fixed else math.ceil(repeats * self.depth)):
                step = stride if repeat == 0 else 1
                blocks.append(BlockSizes(inputs, inputs * expansion, outputs, kernel_size, step))
                inputs = outputs
        return tuple(blocks)


def _round_channels(channels: float) -> int:
    """The nearest multiple of 8, not more than 10 % below."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Block(nnx.Module):
    """Expand 1×1, depthwise, project 1×1, and add the input where the sizes allow (Sandler et al. 2018)."""

    def __init__(self, sizes: BlockSizes, *, epsilon: float, rngs: nnx.Rngs) -> None:
        inputs, hidden, outputs = sizes.inputs, sizes.hidden, sizes.outputs
        self.expands = hidden != inputs
        if self.expands:
            self.expand_conv = Conv(inputs, hidden, 1, axes=(None, None, EMBED, MLP), rngs=rngs)
            self.bn0 = BatchNorm(hidden, axis=MLP, epsilon=epsilon)
        self.depthwise_conv = DepthwiseConv(hidden, sizes.kernel_size, stride=sizes.stride, axis=MLP, rngs=rngs)
        self.bn1 = BatchNorm(hidden, axis=MLP, epsilon=epsilon)
        self.project_conv = Conv(hidden, outputs, 1, axes=(None, None, MLP, EMBED), rngs=rngs)
        self.bn2 = BatchNorm(outputs, axis=EMBED, epsilon=epsilon)
        self.adds = sizes.stride == 1 and inputs == outputs

    def __call__(self, x: jax.Array) -> jax.Array:
        """Map ``x [B, height, width, inputs]`` to ``[B, height/stride, width/stride, outputs]``."""
        y = x
        if self.expands:
            y = jax.nn.relu6(self.bn0(self.expand_conv(y))).astype(x.dtype)
            y = constrain(y, BATCH, HEIGHT, WIDTH, MLP)
        y = jax.nn.relu6(self.bn1(self.depthwise_conv(y))).astype(x.dtype)
        y = constrain(y, BATCH, HEIGHT, WIDTH, MLP)
        y = constrain(self.project_conv(y), BATCH, HEIGHT, WIDTH, EMBED)
        y = self.bn2(y).astype(x.dtype)
        return x + y if self.adds else y


class EfficientNetLite(nnx.Module):
    """An image ``[B, size, size, 3]``, float32, to logits ``[B, num_classes]``, float32."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        epsilon = config.norm_epsilon
        sizes = config.blocks()
        # The first block does not expand: its hidden channels are the stem's.
        self.conv_stem = Conv(3, STEM, 3, stride=2, axes=(None, None, None, MLP), rngs=rngs)
        self.bn0 = BatchNorm(STEM, axis=MLP, epsilon=epsilon)
        self.blocks = nnx.List([Block(block, epsilon=epsilon, rngs=rngs) for block in sizes])
        self.conv_head = Conv(sizes[-1].outputs, HEAD, 1, axes=(None, None, EMBED, CHANNELS), rngs=rngs)
        self.bn1 = BatchNorm(HEAD, axis=CHANNELS, epsilon=epsilon)
        self.fc = Linear(HEAD, config.num_classes, axes=(VOCAB, EMBED), use_bias=True, rngs=rngs)

    def __call__(self, image: jax.Array) -> jax.Array:
        """Classify preprocessed images: ``(pixel - 127) / 128``, RGB."""
        dtype = self.conv_stem.weight[...].dtype
        x = constrain(image.astype(dtype), BATCH, HEIGHT, WIDTH, None)
        x = jax.nn.relu6(self.bn0(self.conv_stem(x))).astype(dtype)
        x = constrain(x, BATCH, HEIGHT, WIDTH, MLP)
        for block in self.blocks:
            x = block(x)
        x = jax.nn.relu6(self.bn1(self.conv_head(x)))
        x = constrain(x, BATCH, HEIGHT, WIDTH, CHANNELS)
        x = constrain(jnp.mean(x, axis=(1, 2)), BATCH, EMBED)  # [B, HEAD]
        return constrain(self.fc(x), BATCH, VOCAB)


def input_spec(config: Config) -> dict[str, InputSpec]:
    """One image, preprocessed, channels last."""
    size = config.image_size
    return {"image": InputSpec(("batch", size, size, 3), "float32", axes=(BATCH, HEIGHT, WIDTH, None))}


_NORM = ("weight", "bias", "running_mean", "running_var")
_CONV = (2, 3, 1, 0)  # [out, in, height, width] to [height, width, in, out]


def name_table(config: Config, stored: str) -> dict[str, Source]:
    """The checkpoint's names are the model's with an underscore before each module's: ``_blocks.0._bn1.weight``."""
    table: dict[str, Source] = {}
    for path, shape in _parameters(config).items():
        *modules, leaf = path.split(".")
        name = ".".join([*(m if m.isdecimal() else f"_{m}" for m in modules), leaf])
        table[path] = Source(name, transpose=_CONV if len(shape) == 4 else None)
    return table


def _parameters(config: Config) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter, kept by hand so that recognising a checkpoint builds no model."""
    shapes: dict[str, tuple[int, ...]] = {}

    def convolution(path: str, norm: str, size: int, inputs: int, outputs: int) -> None:
        shapes[f"{path}.weight"] = (size, size, inputs, outputs)
        for leaf in _NORM:
            shapes[f"{norm}.{leaf}"] = (outputs,)

    convolution("conv_stem", "bn0", 3, 3, STEM)
    for i, block in enumerate(config.blocks()):
        prefix = f"blocks.{i}"
        if block.hidden != block.inputs:
            convolution(f"{prefix}.expand_conv", f"{prefix}.bn0", 1, block.inputs, block.hidden)
        convolution(f"{prefix}.depthwise_conv", f"{prefix}.bn1", block.kernel_size, 1, block.hidden)
        convolution(f"{prefix}.project_conv", f"{prefix}.bn2", 1, block.hidden, block.outputs)
    convolution("conv_head", "bn1", 1, config.blocks()[-1].outputs, HEAD)
    shapes["fc.weight"] = (config.num_classes, HEAD)
    shapes["fc.bias"] = (config.num_classes,)
    return shapes


def _stored_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this configuration."""
    table = name_table(config, "pth")
    return {
        table[path].name: tuple(shape[i] for i in (3, 2, 0, 1)) if len(shape) == 4 else shape
        for path, shape in _parameters(config).items()
    }
