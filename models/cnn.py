"""A small convolutional classifier: two 3×3 convolutions on a 32×32 grey image, pooling, and a linear head.

It is small enough to see what each way of splitting a convolutional network costs in communication. With the rules of
``AxisRules`` changed, the same model is split by

- batch (``batch`` over ``data``, the default): no communication;
- output channel (``channels`` over ``model``, the default): the second convolution, which has 98 % of the products,
  is split by output channel. The first one is not, because its output would have to be gathered ([B, 32, 32, 32]):
  every device computes it whole. The head contracts the split channels: one all-reduce of the logits, 40 bytes an
  image;
- input channel (``embed="model", channels=None``): the first convolution is split by output channel and the second
  contracts it: one all-reduce of [B, 32, 32, 64];
- rows, columns, blocks of the image (``height="seq", width=None``; ``width="seq"``; each over its own mesh axis): a
  convolution needs one row or column of its neighbours (halo exchange, a collective-permute each way), and the head,
  whose weight is split by position likewise, one all-reduce of the logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from spmd_infer.axes import BATCH, CHANNELS, EMBED, HEIGHT, WIDTH, constrain
from spmd_infer.errors import ModelError
from spmd_infer.models.convolution import Conv
from spmd_infer.tensors import InputSpec, Source


@dataclass(frozen=True)
class Config:
    """Sizes of a ``SmallCNN``.

    Attributes:
        image_size: rows and columns of the input.
        num_channels: channels of the input.
        hidden_sizes: output channels of the two convolutions.
        pool_size: rows and columns that pooling takes together; divides ``image_size``.
        num_classes: size of the classifier.
    """

    image_size: int = 32
    num_channels: int = 1
    hidden_sizes: tuple[int, int] = (32, 64)
    pool_size: int = 4
    num_classes: int = 10

    def __post_init__(self) -> None:
        if len(self.hidden_sizes) != 2:
            raise ModelError(f"SmallCNN has two convolutions, but hidden_sizes is {self.hidden_sizes}")
        if self.pool_size < 1 or self.image_size % self.pool_size:
            raise ModelError(f"SmallCNN: pool_size {self.pool_size} does not divide image_size {self.image_size}")

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> Config:
        """Read ``image_size``, ``num_channels``, ``hidden_sizes``, ``pool_size`` and ``num_labels`` or ``id2label``."""
        base = cls()
        return cls(
            image_size=int(config.get("image_size", base.image_size)),
            num_channels=int(config.get("num_channels", base.num_channels)),
            hidden_sizes=tuple(config.get("hidden_sizes", base.hidden_sizes)),
            pool_size=int(config.get("pool_size", base.pool_size)),
            num_classes=int(config.get("num_labels") or len(config.get("id2label") or ()) or base.num_classes),
        )

    @classmethod
    def from_shapes(cls, shapes: Mapping[str, tuple[int, ...]]) -> Config | None:
        """Read the sizes off the tensors of a checkpoint, for a 32×32 image; None for other models' tensors.

        Args:
            shapes: shape of each stored tensor: convolutions ``[out, in, 3, 3]``, the head ``[classes, in, h, w]``.
        """
        conv1, conv2 = shapes.get("conv1.weight", ()), shapes.get("conv2.weight", ())
        head = shapes.get("head.weight", ())
        if not (len(conv1) == len(conv2) == len(head) == 4) or not head[2] or cls.image_size % head[2]:
            return None
        config = cls(
            num_channels=conv1[1],
            hidden_sizes=(conv1[0], conv2[0]),
            pool_size=cls.image_size // head[2],
            num_classes=head[0],
        )
        return config if _stored_shapes(config) == dict(shapes) else None

    def axis_units(self) -> Mapping[str, int]:
        """Every channel, row and column stands for itself."""
        return {}


class PositionHead(nnx.Module):
    """A linear classifier of a feature map, its weight ``[classes, height, width, in]`` split as the map is."""

    def __init__(self, in_features: int, size: int, num_classes: int, *, rngs: nnx.Rngs) -> None:
        initial = nnx.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=(1, 2, 3), out_axis=0)
        weight = initial(rngs.params(), (num_classes, size, size, in_features))
        self.weight = nnx.Param(weight, axes=(None, HEIGHT, WIDTH, CHANNELS))
        self.bias = nnx.Param(jnp.zeros((num_classes,)), axes=(None,))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Score ``x [B, height, width, in]`` as float32 ``[B, classes]``."""
        y = jnp.einsum("bhwc,vhwc->bv", x, self.weight[...], preferred_element_type=jnp.float32)
        return y + self.bias[...].astype(jnp.float32)


class SmallCNN(nnx.Module):
    """An image ``[B, 32, 32, 1]``, float32 from 0 to 1, to logits ``[B, 10]``, float32."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        inner, outer = config.hidden_sizes
        self.conv1 = Conv(config.num_channels, inner, 3, axes=(None, None, None, EMBED), use_bias=True, rngs=rngs)
        self.conv2 = Conv(inner, outer, 3, axes=(None, None, EMBED, CHANNELS), use_bias=True, rngs=rngs)
        self.head = PositionHead(outer, config.image_size // config.pool_size, config.num_classes, rngs=rngs)
        self.pool_size = config.pool_size

    def __call__(self, image: jax.Array) -> jax.Array:
        """Classify images."""
        dtype = self.conv1.weight[...].dtype
        x = constrain(image.astype(dtype), BATCH, HEIGHT, WIDTH, None)
        x = constrain(jax.nn.relu(self.conv1(x)).astype(dtype), BATCH, HEIGHT, WIDTH, EMBED)
        x = constrain(jax.nn.relu(self.conv2(x)).astype(dtype), BATCH, HEIGHT, WIDTH, CHANNELS)
        x = constrain(_max_pool(x, self.pool_size), BATCH, HEIGHT, WIDTH, CHANNELS)
        return constrain(self.head(x), BATCH, None)


def _max_pool(x: jax.Array, size: int) -> jax.Array:
    """The largest of each ``size`` × ``size`` patch, as a reshape: it stays on its device under any split."""
    batch, height, width, channels = x.shape
    return x.reshape(batch, height // size, size, width // size, size, channels).max(axis=(2, 4))


def input_spec(config: Config) -> dict[str, InputSpec]:
    """One image, channels last."""
    shape = ("batch", config.image_size, config.image_size, config.num_channels)
    return {"image": InputSpec(shape, "float32", axes=(BATCH, HEIGHT, WIDTH, None))}


def name_table(config: Config, stored: str) -> dict[str, Source]:
    """The checkpoint's names are the model's; its layout is PyTorch's, channels before rows and columns."""
    convolution = (2, 3, 1, 0)
    return {
        "conv1.weight": Source("conv1.weight", transpose=convolution),
        "conv1.bias": Source("conv1.bias"),
        "conv2.weight": Source("conv2.weight", transpose=convolution),
        "conv2.bias": Source("conv2.bias"),
        "head.weight": Source("head.weight", transpose=(0, 2, 3, 1)),
        "head.bias": Source("head.bias"),
    }


def _stored_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint of this configuration."""
    inner, outer = config.hidden_sizes
    size = config.image_size // config.pool_size
    return {
        "conv1.weight": (inner, config.num_channels, 3, 3),
        "conv1.bias": (inner,),
        "conv2.weight": (outer, inner, 3, 3),
        "conv2.bias": (outer,),
        "head.weight": (config.num_classes, outer, size, size),
        "head.bias": (config.num_classes,),
    }
