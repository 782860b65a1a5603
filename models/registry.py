"""The families of models that ``Engine.load`` knows, and how a checkpoint is matched to one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol

import jax
import msgspec
import numpy as np
from flax import nnx

from spmd_infer.errors import ModelError
from spmd_infer.models.phases import Phase, decoder_phases
from spmd_infer.tensors import InputSpec, Source


class ModelConfig(Protocol):
    """What every family's frozen ``Config`` offers besides its sizes."""

    def axis_units(self) -> Mapping[str, int]:
        """Indivisible units of each logical axis whose size says otherwise: heads of a fused projection."""
        ...


@dataclass(frozen=True)
class Family:
    """One model family; its module is imported only when it is used.

    The module offers ``Config`` (with ``from_hf(config)`` and, where a checkpoint may come without a configuration,
    ``from_shapes(shapes)``, which returns None for another family's tensors), the model class, ``input_spec(config)``
    and ``name_table(config, stored)``.

    Attributes:
        name: the family's name.
        architectures: values of ``architectures`` in a Hugging Face config, and GGUF architecture names.
        module: where it is defined.
        model: the name of the Flax module class; built as ``Model(config, rngs=nnx.Rngs(seed))``.
        task: which task answers for it: ``embed``, ``classify`` or ``generate``.
        nameless: whether it recognises checkpoints without configuration from their tensor shapes.
    """

    name: str
    architectures: tuple[str, ...]
    module: str
    model: str
    task: str
    nameless: bool = False

    def config_from_hf(self, config: Mapping[str, Any]) -> ModelConfig:
        """The family's configuration, from the keys of a Hugging Face ``config.json``."""
        result: ModelConfig = import_module(self.module).Config.from_hf(config)
        return result

    def config_from_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> ModelConfig | None:
        """The family's configuration read off tensor names and shapes; None where they are not its own."""
        if not self.nameless:
            return None
        result: ModelConfig | None = import_module(self.module).Config.from_shapes(shapes)
        return result

    def config_from_sizes(self, sizes: Mapping[str, Any]) -> ModelConfig:
        """The family's configuration from its own fields, as ``sizes_of`` gave them.

        Raises:
            ModelError: they are not this family's.
        """
        try:
            result: ModelConfig = msgspec.convert(dict(sizes), import_module(self.module).Config, strict=False)
        except (msgspec.ValidationError, TypeError) as error:
            raise ModelError(f"these are not sizes of a {self.name} model: {error}") from error
        return result

    def build(self, config: ModelConfig, *, seed: int = 0) -> nnx.Module:
        """The model with random weights (abstract ones under ``nnx.eval_shape``)."""
        model: nnx.Module = getattr(import_module(self.module), self.model)(config, rngs=nnx.Rngs(seed))
        return model

    def abstract(self, config: ModelConfig) -> nnx.Module:
        """The model with abstract weights, its shapes alone; many times faster than ``nnx.eval_shape`` of ``build``."""
        build = getattr(import_module(self.module), self.model)
        model: nnx.Module = nnx.eval_shape(lambda: build(config, rngs=_OneKey()))
        return model

    @property
    def layers(self) -> str | None:
        """The path of the model's list of layers, where all of them are alike (as pipelines need them)."""
        found: str | None = getattr(getattr(import_module(self.module), self.model), "pipelined_layers", None)
        return found

    def input_spec(self, config: ModelConfig) -> dict[str, InputSpec]:
        """The model's inputs by argument name."""
        spec: dict[str, InputSpec] = import_module(self.module).input_spec(config)
        return spec

    def cache_bytes(self, config: ModelConfig, dtype: Any) -> int:
        """Bytes of keys and values that a model keeps for one position of one row; 0 where it keeps none."""
        if self.task != "generate":
            return 0
        sizes: Any = config
        return int(2 * sizes.num_layers * sizes.num_kv_heads * sizes.head_dim * np.dtype(dtype).itemsize)

    def phases(
        self, config: ModelConfig, input_len: int, output_len: int, dtype: Any, cache_dtype: str = "auto"
    ) -> tuple[Phase, ...]:
        """The kinds of steps of a model that generates; none for a model that takes one."""
        return decoder_phases(config, input_len, output_len, dtype, cache_dtype) if self.task == "generate" else ()

    def context_len(self, config: ModelConfig) -> int | None:
        """The longest row that a model of text takes; None where rows have no length."""
        found = getattr(config, "context_len", getattr(config, "max_positions", None))
        return None if found is None else int(found)

    def name_table(self, config: ModelConfig, stored: str) -> dict[str, Source]:
        """Each weight's place in a checkpoint.

        Args:
            config: the model's configuration.
            stored: the checkpoint's format: ``safetensors``, ``gguf`` or ``pth``.

        Returns:
            For each parameter path (attribute names and list positions joined by dots), its source.
        """
        table: dict[str, Source] = import_module(self.module).name_table(config, stored)
        return table


FAMILIES: tuple[Family, ...] = (
    Family("cnn", ("SmallCNN",), "spmd_infer.models.cnn", "SmallCNN", "classify", nameless=True),
    Family(
        "bert",
        ("BertModel", "BertForMaskedLM", "BertForPreTraining", "bert"),
        "spmd_infer.models.bert",
        "Bert",
        "embed",
    ),
    Family(
        "efficientnet-lite",
        ("EfficientNetLite",),
        "spmd_infer.models.efficientnet",
        "EfficientNetLite",
        "classify",
        nameless=True,
    ),
    Family("llama", ("LlamaForCausalLM", "llama"), "spmd_infer.models.llama", "Llama", "generate"),
)


class _OneKey:
    """Stands in for ``nnx.Rngs`` where no weight gets a value: the same key each time.

    Under a trace every key that ``nnx.Rngs`` gives out costs a walk over all that was traced before (Flax asks a tracer
    for its sharding), so that a deep model takes time in the square of its depth: 25 s for 126 layers instead of 0.7.
    """

    def params(self) -> jax.Array:
        """A key."""
        return jax.random.key(0)


def sizes_of(config: ModelConfig) -> dict[str, Any]:
    """A family's configuration as plain data."""
    plain: dict[str, Any] = msgspec.to_builtins(config)
    return plain


def family_named(name: str) -> Family:
    """The family of that name.

    Raises:
        ModelError: there is none.
    """
    for family in FAMILIES:
        if family.name == name:
            return family
    raise ModelError(f"no model family is called {name!r}; known are {', '.join(family.name for family in FAMILIES)}")


def find_family(architecture: str | None, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Family, ModelConfig | None]:
    """The family of a checkpoint.

    Args:
        architecture: what the checkpoint says it is, if it says.
        shapes: the shape of each tensor in it.

    Returns:
        The family, and its configuration where it had to be read off the shapes.

    Raises:
        ModelError: no family answers to that architecture, or recognises those tensors.
    """
    if architecture is not None:
        for family in FAMILIES:
            if architecture in family.architectures:
                return family, None
    else:
        for family in FAMILIES:
            config = family.config_from_shapes(shapes)
            if config is not None:
                return family, config
    known = "; ".join(f"{family.name}: {', '.join(family.architectures)}" for family in FAMILIES)
    said = f"architecture {architecture!r}" if architecture else f"{len(shapes)} tensors and no configuration"
    raise ModelError(f"the checkpoint has {said}, which no model family here answers to; known are {known}")
