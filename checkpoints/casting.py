"""Which dtypes a stored tensor may be cast to on its way to the devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.reader import TensorInfo
from spmd_infer.errors import CheckpointError

_SCALES = ("_scale", "_scale_inv")


def cast_problem(info: TensorInfo, wanted: np.dtype[Any], tensors: Mapping[str, TensorInfo]) -> str | None:
    """Why a tensor must not be cast to a dtype; None where it may.

    Floats may become floats of any width, complex and integers likewise; ``cast`` sees to it that the values fit.
    A float8 tensor with a tensor of scales beside it (``weight_scale``, ``weight_scale_inv``) may not be cast: its
    values mean nothing without them.
    """
    import jax.numpy as jnp  # copies that cast nothing do without

    stored = info.dtype
    if stored == wanted:
        return None
    if jnp.issubdtype(stored, jnp.floating) and jnp.issubdtype(wanted, jnp.floating):
        scale = next((info.name + end for end in _SCALES if info.name + end in tensors), None)
        if stored.itemsize == 1 and scale is not None:
            return f"its values are to be multiplied by {scale!r}, which a cast would ignore"
        return None
    if jnp.issubdtype(stored, jnp.complexfloating) and jnp.issubdtype(wanted, jnp.complexfloating):
        return None
    if jnp.issubdtype(stored, jnp.integer) and jnp.issubdtype(wanted, jnp.integer):
        return None
    return f"{stored.name} is not cast to {wanted.name}"


def cast(values: npt.NDArray[Any], target: npt.NDArray[Any], name: str) -> None:
    """Copy values into an array of another dtype.

    Raises:
        CheckpointError: finite values do not fit the target's dtype.
    """
    import jax.numpy as jnp

    if jnp.issubdtype(target.dtype, jnp.integer) and values.size and not np.can_cast(values.dtype, target.dtype):
        low, high, limits = int(values.min()), int(values.max()), np.iinfo(target.dtype)
        if low < limits.min or high > limits.max:
            raise CheckpointError(
                f"tensor {name!r} has values from {low} to {high}, which overflow {target.dtype.name}"
            )
    try:
        with np.errstate(over="raise", invalid="ignore"):
            np.copyto(target, values, casting="unsafe")
        # numpy does not watch the casts to float8.
        fits = target.dtype.itemsize > 1 or bool((np.isfinite(target) == np.isfinite(values)).all())
    except FloatingPointError:
        fits = False
    if not fits:
        raise CheckpointError(
            f"tensor {name!r} has values up to {np.nanmax(np.abs(values)):.3g}, which overflow {target.dtype.name}; "
            f"load it as float32 or bfloat16"
        )
