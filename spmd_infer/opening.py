"""From a checkpoint's path to the model in it, without reading a weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from spmd_infer.axes import SEQ
from spmd_infer.checkpoints import Reader
from spmd_infer.checkpoints.native_reader import Verify
from spmd_infer.checkpoints.native_store import stored_model
from spmd_infer.demo import open_source
from spmd_infer.errors import CheckpointError, ModelError
from spmd_infer.functional import ModelFunction, model_function
from spmd_infer.models import Family, find_family
from spmd_infer.models.phases import Phase
from spmd_infer.models.quantised import SCALE_END, WeightFormat, quantised
from spmd_infer.models.registry import ModelConfig, family_named
from spmd_infer.planning.traces import Shallow
from spmd_infer.planning.workload import Workload
from spmd_infer.repeated_layers import BUILT, deepened, repeated
from spmd_infer.tensors import InputSpec, Source

MANY_LAYERS = 8
"""From this depth on plans are made from the traces of two and three layers."""


@dataclass(frozen=True, kw_only=True)
class DescribedModel:
    """A zoo model of certain sizes, of which no weight exists.

    Attributes:
        family: the family that it belongs to.
        config: its sizes.
        model: the model with abstract parameters in the dtypes that they will have.
        inputs: what the model takes.
        dtype: the floating-point dtype that it computes in.
        weight_format: how its projections hold their weights; None for floats.
        formats: likewise, of each weight that is quantised.
    """

    family: Family
    config: ModelConfig
    model: ModelFunction
    inputs: dict[str, InputSpec]
    dtype: Any
    weight_format: WeightFormat | None = None
    formats: Mapping[str, WeightFormat] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a plan should say of the weights' format."""
        if not self.formats:
            return ()
        kinds = Counter(weight_format.kind for weight_format in self.formats.values())
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        return (f"quantised weights: {said} with float32 scales; the others {self.dtype}",)

    def workload(self, traffic: Workload) -> Workload:
        """The traffic with rows no longer than this model takes."""
        longest = self.family.context_len(self.config)
        length = traffic.size(SEQ)
        if longest is not None and self.family.task == "generate":
            length = min(length, max(1, longest - traffic.output_len))
        return replace(traffic, sizes={**traffic.sizes, SEQ: length if longest is None else min(length, longest)})

    def phases(self, traffic: Workload) -> tuple[Phase, ...]:
        """The kinds of steps that this model takes for such traffic; none where it takes one."""
        return self.family.phases(self.config, traffic.size(SEQ), traffic.output_len, self.dtype, traffic.cache_dtype)

    def shallow(self, traffic: Workload) -> Shallow | None:
        """The same model with few layers, where it has so many that tracing all of them takes long."""
        depth = getattr(self.config, "num_layers", 0)
        if depth < MANY_LAYERS:
            return None

        def cut(num_layers: int) -> tuple[ModelFunction, dict[str, Any]]:
            config: Any = replace(self.config, num_layers=num_layers)  # type: ignore[type-var]  # every Config is one
            model, _ = abstract_model(self.family, config, self.weight_format, self.dtype)
            params = {
                path: jax.ShapeDtypeStruct(p.shape, self.model.params[path].dtype) for path, p in model.params.items()
            }
            part = DescribedModel(
                family=self.family,
                config=config,
                model=model.with_params(params),
                inputs=self.inputs,
                dtype=self.dtype,
            )
            return part.model, {phase.name: phase.inputs for phase in part.phases(traffic)} or {"infer": self.inputs}

        return Shallow(depth, cut(2), cut(3))


@dataclass(frozen=True, kw_only=True)
class OpenedModel(DescribedModel):
    """A checkpoint matched to a model family.

    Attributes:
        reader: the open checkpoint.
        table: where each parameter is stored.
    """

    reader: Reader
    table: dict[str, Source]


def abstract_model(
    family: Family, config: ModelConfig, weight_format: WeightFormat | None, dtype: Any
) -> tuple[ModelFunction, Mapping[str, WeightFormat]]:
    """A family's model without weights, its projections quantised if they are to be, and the format of each."""
    depth, layers = getattr(config, "num_layers", 0), family.layers
    if depth < MANY_LAYERS or layers is None:
        return _built(family, config, weight_format, dtype)
    small: Any = replace(config, num_layers=BUILT)  # type: ignore[type-var]  # every Config is a dataclass
    few, formats = _built(family, small, weight_format, dtype)
    whole = deepened(few, layers, depth, lambda: _built(family, config, weight_format, dtype)[0])
    return whole, repeated(formats, layers, depth)


def _built(
    family: Family, config: ModelConfig, weight_format: WeightFormat | None, dtype: Any
) -> tuple[ModelFunction, Mapping[str, WeightFormat]]:
    """The same with every layer built."""
    module = family.abstract(config)
    formats = quantised(module, weight_format, dtype) if weight_format is not None else {}
    return model_function(module), formats


def describe_model(config: Mapping[str, Any], dtype: Any = None, quantize: str | None = None) -> DescribedModel:
    """The model that a configuration describes.

    Args:
        config: the keys of a Hugging Face ``config.json``.
        dtype: of the weights; default ``torch_dtype`` of the configuration, else bfloat16.
        quantize: as for ``open_model``.

    Raises:
        ModelError: no family answers to it, or the dtype or format is unknown.
    """
    named = next(iter(config.get("architectures") or []), config.get("model_type"))
    family, _ = find_family(named, {})
    sizes = family.config_from_hf(config)
    said = dtype if dtype is not None else config.get("dtype", config.get("torch_dtype", "bfloat16"))
    wanted = floating_dtype(said)
    weight_format = WeightFormat.parse(quantize) if quantize is not None else None
    model, formats = abstract_model(family, sizes, weight_format, wanted)
    params = {
        path: value if _of_quantised(path, formats) else jax.ShapeDtypeStruct(value.shape, wanted)
        for path, value in model.params.items()
    }
    return DescribedModel(
        family=family,
        config=sizes,
        model=model.with_params(params),
        inputs=family.input_spec(sizes),
        dtype=wanted,
        weight_format=weight_format,
        formats=formats,
    )


def _of_quantised(path: str, formats: Mapping[str, WeightFormat]) -> bool:
    """Whether a parameter is a quantised weight or the scales of one."""
    return path in formats or path.removesuffix(SCALE_END) in formats


def open_model(
    path: str | Path,
    dtype: Any = None,
    *,
    platform: str = "cpu",
    verify: Verify = "full",
    quantize: str | None = None,
) -> OpenedModel:
    """Open a checkpoint and find its model.

    Args:
        path: a Hugging Face or native folder, a ``.safetensors``, ``.gguf`` or ``.pth`` file, or the name of a packaged
            demo such as ``demo:smollm2``.
        dtype: load floating-point weights in this dtype. By default they keep the dtype that they are stored in;
            quantised ones become float32 on CPU and bfloat16 elsewhere.
        platform: where the weights will live.
        verify: as for ``open_checkpoint``.
        quantize: hold the projections' weights as ``int8``, ``fp8``, ``int4`` or ``int4:GROUP``; see
            ``spmd_infer.models.quantised``. All other weights are then loaded in ``dtype``, by default float32 on CPU
            and bfloat16 elsewhere.

    Raises:
        CheckpointError: the file is damaged, or is not a checkpoint.
        ModelError: no family answers to it, the dtype is not a floating-point one, or the format is unknown.
    """
    wanted = None if dtype is None else floating_dtype(dtype)
    return match_model(open_source(path, verify), wanted, platform=platform, quantize=quantize)


def match_model(
    reader: Reader, wanted: Any = None, *, platform: str = "cpu", quantize: str | None = None
) -> OpenedModel:
    """Find the model of an open checkpoint; arguments and errors as for ``open_model``."""
    stored, (family, config) = stored_model(reader), _family_and_sizes(reader)
    if config is None:
        config = family.config_from_hf(reader.config)
    default = jnp.dtype(jnp.float32 if platform == "cpu" else jnp.bfloat16)
    weight_format = WeightFormat.parse(quantize) if quantize is not None else None
    if weight_format is not None and wanted is None:
        wanted = default
    model, formats = abstract_model(family, config, weight_format, wanted)
    read = [name for name in model.params if name.removesuffix(SCALE_END) not in formats or name in formats]
    if stored is not None and stored.family is not None:
        table = {name: Source(name) for name in read}
    else:
        # A native checkpoint of no family keeps the names that its source had.
        said = stored.names if stored is not None else reader.stored
        table = family.name_table(config, said)
    unsourced = sorted(set(read) - table.keys())
    if unsourced:
        raise CheckpointError(
            f"{reader.path}: the {family.name} name table has no entry for {len(unsourced)} weights, "
            f"such as {unsourced[0]}"
        )

    def loaded_dtype(name: str, own: Any) -> Any:
        if not jnp.issubdtype(own, jnp.floating) or _of_quantised(name, formats):
            return own
        if wanted is not None:
            return wanted
        info = reader.tensors.get(table[name].name)
        if info is None:
            return own  # the loader names it with all others that are missing
        return default if info.nbytes < info.size * info.dtype.itemsize else info.dtype

    params = {
        name: jax.ShapeDtypeStruct(value.shape, loaded_dtype(name, value.dtype)) for name, value in model.params.items()
    }
    return OpenedModel(
        family=family,
        config=config,
        model=model.with_params(params),
        inputs=family.input_spec(config),
        dtype=wanted or max(params.values(), key=lambda p: p.size).dtype,
        weight_format=weight_format,
        formats=formats,
        reader=reader,
        table={name: table[name] for name in read},
    )


def family_of(path: str | Path) -> Family:
    """The family of a checkpoint's model, which is not built; arguments and errors as for ``open_model``."""
    return _family_and_sizes(open_source(path, "off"))[0]


def _family_and_sizes(reader: Reader) -> tuple[Family, ModelConfig | None]:
    """A checkpoint's family, and its sizes where they are told by something else than a ``config.json``."""
    stored = stored_model(reader)
    if stored is None or stored.family is None:
        return find_family(reader.architecture, {name: tuple(info.shape) for name, info in reader.tensors.items()})
    family = family_named(stored.family)
    return family, family.config_from_sizes(stored.sizes) if stored.sizes is not None else None


def floating_dtype(dtype: Any) -> Any:
    """A dtype for weights, from its name or itself.

    Raises:
        ModelError: it is not a floating-point dtype.
    """
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise ModelError(f"unknown dtype {dtype!r}; use float32, bfloat16 or float16") from error
    if not jnp.issubdtype(found, jnp.floating):
        raise ModelError(f"weights cannot be loaded as {found.name}; use float32, bfloat16 or float16")
    return found
