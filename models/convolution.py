"""The blocks that image models are wired from: convolutions and inference-time batch norm.

Activations are ``[batch, height, width, channels]``, weights ``[height, width, in, out]``, the layout that XLA prefers
on CPU and GPU. Padding is TensorFlow's "SAME": an output has ``ceil(size / stride)`` rows, and where the padding is odd
the extra row goes below and to the right. Products accumulate in float32 and are returned so, because a batch norm and
an activation follow; the caller rounds once after them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from spmd_infer.models.halo import Padding, convolve
from spmd_infer.tensors import Axes

_initial = nnx.initializers.variance_scaling(2.0, "fan_in", "normal")


class Conv(nnx.Module):
    """A plain convolution; one over a single position (``kernel_size=1``) is computed as a matrix product.

    Args:
        in_features: input channels.
        out_features: output channels.
        kernel_size: rows and columns of the kernel.
        stride: rows and columns between outputs.
        axes: logical axes of the weight, ``(height, width, in, out)``.
        use_bias: whether there is a bias; it carries the ``out`` axis.
        rngs: source of the initial weights.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int,
        *,
        axes: Axes,
        stride: int = 1,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (kernel_size, kernel_size, in_features, out_features)
        self.weight = nnx.Param(_initial(rngs.params(), shape), axes=axes)
        self.bias = nnx.Param(jnp.zeros((out_features,)), axes=axes[-1:]) if use_bias else None
        self.stride, self.channel_axes = stride, axes[2:]

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve ``x [B, height, width, in]`` to float32 ``[B, ceil(height/stride), ceil(width/stride), out]``."""
        weight = self.weight[...]
        if weight.shape[:2] == (1, 1) and self.stride == 1:
            y = lax.dot_general(x, weight[0, 0], (((3,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        else:
            inputs, outputs = self.channel_axes
            y = convolve(self._convolve, x, weight, stride=self.stride, inputs=inputs, outputs=outputs)
        if self.bias is not None:
            y = y + self.bias[...].astype(jnp.float32)
        return y

    def _convolve(self, x: jax.Array, weight: jax.Array, padding: Padding) -> jax.Array:
        return lax.conv_general_dilated(
            x,
            weight,
            (self.stride, self.stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            preferred_element_type=jnp.float32,
        )


class DepthwiseConv(nnx.Module):
    """A convolution of each channel by itself, computed as one shifted multiply-add for each position of the kernel.

    XLA fuses these into one loop over the output, and splits them over channels as any elementwise product. On CPU that
    is 3 to 30 times faster than ``conv_general_dilated`` with a group for each channel, most often 15
    (``benchmarks/depthwise_conv.py``).

    Args:
        features: channels.
        kernel_size: rows and columns of the kernel.
        stride: rows and columns between outputs.
        axis: logical axis of the channels.
        rngs: source of the initial weights.
    """

    def __init__(self, features: int, kernel_size: int, *, axis: str | None, stride: int = 1, rngs: nnx.Rngs) -> None:
        shape = (kernel_size, kernel_size, 1, features)
        self.weight = nnx.Param(_initial(rngs.params(), shape), axes=(None, None, None, axis))
        self.stride, self.axis = stride, axis

    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve ``x [B, height, width, C]`` to float32 ``[B, ceil(height/stride), ceil(width/stride), C]``."""
        weight = self.weight[...]
        return convolve(self._convolve, x, weight, stride=self.stride, inputs=None, outputs=self.axis, depthwise=True)

    def _convolve(self, x: jax.Array, weight: jax.Array, padding: Padding) -> jax.Array:
        weight = weight.astype(jnp.float32)
        kernel_size, stride = weight.shape[0], self.stride
        padded = jnp.pad(x.astype(jnp.float32), ((0, 0), *padding, (0, 0)))
        batch, height, width, channels = padded.shape
        rows, columns = (height - kernel_size) // stride + 1, (width - kernel_size) // stride + 1
        y = jnp.zeros((batch, rows, columns, channels), jnp.float32)
        for i in range(kernel_size):
            for j in range(kernel_size):
                end = (batch, i + (rows - 1) * stride + 1, j + (columns - 1) * stride + 1, channels)
                y = y + lax.slice(padded, (0, i, j, 0), end, (1, stride, stride, 1)) * weight[i, j, 0]
        return y


class BatchNorm(nnx.Module):
    """Batch norm with the statistics of training, so one multiply-add a channel (Ioffe and Szegedy 2015).

    Args:
        features: channels.
        axis: their logical axis.
        epsilon: added to the variance.
    """

    def __init__(self, features: int, *, axis: str | None, epsilon: float) -> None:
        self.weight = nnx.Param(jnp.ones((features,)), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((features,)), axes=(axis,))
        self.running_mean = nnx.Param(jnp.zeros((features,)), axes=(axis,))
        self.running_var = nnx.Param(jnp.ones((features,)), axes=(axis,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise ``x [..., C]``, in float32."""
        weight, bias = self.weight[...].astype(jnp.float32), self.bias[...].astype(jnp.float32)
        mean, variance = self.running_mean[...].astype(jnp.float32), self.running_var[...].astype(jnp.float32)
        scale = weight * lax.rsqrt(variance + self.epsilon)  # [C]
        return x.astype(jnp.float32) * scale + (bias - mean * scale)
