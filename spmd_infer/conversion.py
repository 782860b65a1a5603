"""From one checkpoint to another: what ``convert`` and ``reshard`` do, and what saving knows of a model.

``checkpoints`` moves tensors; the families in ``models`` know what the tensors are called and how they may be split.
Here the two meet.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from spmd_infer.axes import AxisRules
from spmd_infer.checkpoints.attention_fusion import fuse_qkv, fused_axes, split_qkv
from spmd_infer.checkpoints.copying import Advance, CopyPlan, Quantisation, plan_copy
from spmd_infer.checkpoints.derived import DerivedReader, by_parameter, by_stored_name, same, with_dtype
from spmd_infer.checkpoints.lora import merge_lora
from spmd_infer.checkpoints.manifest import ModelEntry
from spmd_infer.checkpoints.mesh_boxes import MeshLayout, layers_of
from spmd_infer.checkpoints.native_store import model_entry, store, stored_axes, stored_model
from spmd_infer.checkpoints.reader import Reader
from spmd_infer.checkpoints.safetensors_writer import store_hugging_face
from spmd_infer.checkpoints.shares import Share
from spmd_infer.errors import CheckpointError, ModelError
from spmd_infer.mesh import MeshSpec
from spmd_infer.tensors import Axes

if TYPE_CHECKING:  # most native checkpoints say all that is needed themselves, and the models take a second to import
    from spmd_infer.models.registry import Family, ModelConfig
    from spmd_infer.opening import OpenedModel

Target = Literal["native", "huggingface"]
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


@dataclass(frozen=True)
class Changes:
    """What is to be different in the new checkpoint.

    Attributes:
        dtype: store floats in this dtype.
        quantisation: store weights as small numbers with scales (native only).
        lora: a PEFT adapter to merge.
        qkv: ``fuse`` or ``split`` the query, key and value projections.
        head: ``tie`` the output projection to the embedding, which it must equal, or ``untie`` them.
    """

    dtype: str | None = None
    quantisation: Quantisation | None = None
    lora: Path | None = None
    qkv: Literal["fuse", "split"] | None = None
    head: Literal["tie", "untie"] | None = None


@dataclass(frozen=True)
class Conversion:
    """One checkpoint on its way to another; nothing has been read but headers.

    Attributes:
        reader: the tensors as they will be stored.
        model: what the new checkpoint will say of the model.
        axes: logical axes of the tensors that have any.
        layout: the mesh that the tensors are cut for; None for none.
        quantisation: how weights are made small.
        to: the format.
        note: why the model's family is not known; empty where it is.
    """

    reader: Reader
    model: ModelEntry
    axes: Mapping[str, Axes]
    layout: MeshLayout | None
    quantisation: Quantisation | None
    to: Target
    note: str

    @property
    def plan(self) -> CopyPlan:
        """What it will take."""
        return plan_copy(self.reader, self.quantisation)

    def run(
        self,
        target: Path,
        what: str,
        *,
        overwrite: bool = False,
        share: Share | None = None,
        advance: Advance = lambda count: None,
    ) -> None:
        """Do it, or one process's share of it; see ``native_store.store`` and ``store_hugging_face``."""
        if self.to == "huggingface":
            store_hugging_face(self.reader, target, overwrite=overwrite, advance=advance)
            return
        store(
            self.reader,
            target,
            model=self.model,
            axes=self.axes,
            layout=self.layout,
            quantisation=self.quantisation,
            overwrite=overwrite,
            share=share,
            what=what,
            advance=advance,
        )


def prepare(
    reader: Reader,
    changes: Changes | None = None,
    *,
    to: Target = "native",
    mesh: MeshSpec | None = None,
    hosts: int = 1,
) -> Conversion:
    """Everything about a conversion that headers tell.

    Args:
        reader: the source.
        changes: what is to be different.
        to: the target's format.
        mesh: cut tensors for this mesh (native only).
        hosts: over how many hosts it is spread.

    Raises:
        CheckpointError: the checkpoint cannot be changed in that way.
        MeshError: the mesh cannot be spread over so many hosts.
    """
    wanted = changes or Changes()
    if to == "huggingface" and (mesh is not None or wanted.quantisation is not None or wanted.qkv == "fuse"):
        raise CheckpointError("a Hugging Face folder holds whole, unquantised tensors under their usual names")
    source = split_qkv(reader) if wanted.qkv == "split" else reader
    alone = to == "native" and wanted.qkv is None and wanted.lora is None and wanted.head is None
    found = (stored_subject(source) if alone else None) or subject(source)
    if wanted.lora is not None:
        found = replace(found, reader=merge_lora(found.reader, wanted.lora, _adapter_names(found)))
    if wanted.head is not None:
        found = _with_head(found, wanted.head)
    model, axes = found.model, found.axes
    if wanted.qkv == "fuse":
        found = replace(found, reader=fuse_qkv(found.reader))
        axes = fused_axes(axes)
    if wanted.dtype is not None:
        from spmd_infer.opening import floating_dtype

        found = replace(found, reader=with_dtype(found.reader, np.dtype(floating_dtype(wanted.dtype))))
    tensors: Reader = found.reader
    if to == "huggingface":
        tensors = as_hugging_face(replace(found, reader=tensors), wanted.dtype)
    layout = None
    if mesh is not None:
        layout = MeshLayout(mesh, hosts, AxisRules().with_units(model.units), layers_of(tensors.tensors))
    kept = {name: axes[name] for name in tensors.tensors if name in axes}
    return Conversion(tensors, model, kept, layout, wanted.quantisation, to, found.note)


@dataclass(frozen=True)
class Subject:
    """What is converted.

    Attributes:
        reader: the tensors, under the model's parameter paths where its family is known.
        model: what the new checkpoint will say of the model.
        axes: logical axes of the tensors that have any.
        opened: the model, where its family is known and was asked for.
        note: why the family is not known; empty where it is.
    """

    reader: Reader
    model: ModelEntry
    axes: Mapping[str, Axes]
    opened: OpenedModel | None
    note: str = ""


def stored_subject(reader: Reader) -> Subject | None:
    """A native checkpoint of a known family as what it says of itself, its model not built; None where it says less."""
    stored = stored_model(reader)
    if stored is None or stored.family is None or not stored.units:
        return None
    return Subject(reader, stored, stored_axes(reader), None)


def subject(reader: Reader) -> Subject:
    """A checkpoint as the parameters of its model, or as it is where no family answers to it."""
    from spmd_infer.opening import match_model

    try:
        opened = match_model(reader)
        shapes = {path: tuple(value.shape) for path, value in opened.model.params.items()}
        parameters = by_parameter(reader, opened.table, shapes)
    except (ModelError, CheckpointError) as error:
        return Subject(reader, model_entry(reader), stored_axes(reader), None, str(error))
    return Subject(parameters, entry_of(opened.family, opened.config, reader), dict(opened.model.axes), opened)


def entry_of(family: Family, config: ModelConfig, reader: Reader | None) -> ModelEntry:
    """What a native checkpoint says of a zoo model."""
    from spmd_infer.models.registry import sizes_of

    known = dict(reader.config) if reader is not None else {}
    before = stored_model(reader) if reader is not None else None
    return ModelEntry(
        family=family.name,
        names=before.names if before is not None else reader.stored if reader is not None else "",
        architecture=reader.architecture if reader is not None else None,
        config=known,
        sizes=None if known else sizes_of(config),
        units=dict(config.axis_units()),
    )


def as_hugging_face(found: Subject, dtype: str | None = None) -> DerivedReader:
    """A model's parameters under the names of a Hugging Face folder, with its ``config.json``.

    Raises:
        CheckpointError: the family is not known, or has no such names.
    """
    if found.opened is None:
        raise CheckpointError(
            f"{found.reader.path}: cannot be written as a Hugging Face folder: {found.note or 'unknown family'}"
        )
    config = hugging_face_config(found)
    sizes = {_dtype_name(info.dtype): 0 for info in found.reader.tensors.values()}
    for info in found.reader.tensors.values():
        sizes[_dtype_name(info.dtype)] += info.nbytes
    config["dtype"] = dtype or max(sizes, key=lambda name: sizes[name])
    config.pop("torch_dtype", None)
    family = found.opened.family
    try:
        table = family.name_table(family.config_from_hf(config), "safetensors")
    except ModelError as error:
        raise CheckpointError(f"{found.reader.path}: cannot be written as safetensors: {error}") from error
    unused = found.model.names == "safetensors"
    return by_stored_name(found.reader, table, config=config, architecture=config["architectures"][0], unused=unused)


def hugging_face_config(found: Subject) -> dict[str, Any]:
    """The ``config.json`` of a model; what GGUF files say in other words is put into those of Hugging Face.

    Raises:
        CheckpointError: there is no configuration, or one that a ``config.json`` cannot express.
    """
    assert found.opened is not None
    config = dict(found.model.config)
    if not config:
        raise CheckpointError(f"{found.reader.path}: has no configuration, without which there is no config.json")
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "frequency_factors":
        raise CheckpointError(
            f"{found.reader.path}: gives a factor for each rotary frequency, which a config.json cannot say"
        )
    names = found.opened.family.architectures
    if found.model.names == "gguf" or not config.get("architectures"):
        config["architectures"] = [names[0]]
    config.setdefault("model_type", found.opened.family.name)
    return config


def _dtype_name(dtype: np.dtype[Any]) -> str:
    import jax.numpy as jnp

    return dtype.name if jnp.issubdtype(dtype, jnp.floating) else "float32"


def _adapter_names(found: Subject) -> Any:
    """From an adapter's names, which are those of a Hugging Face checkpoint, to those of the tensors here."""
    if found.opened is None:
        return lambda name: name
    family, config = found.opened.family, found.opened.config
    try:
        table = family.name_table(config, "safetensors")
    except ModelError as error:
        raise CheckpointError(f"{found.reader.path}: no adapter can be merged: {error}") from error
    paths = {source.name: path for path, source in table.items()}
    return lambda name: paths.get(name, name)


def _with_head(found: Subject, head: Literal["tie", "untie"]) -> Subject:
    """The model with its output projection tied to the embedding, or given a copy of it.

    Raises:
        CheckpointError: the model has no such projection, or one that differs from the embedding.
    """
    tensors = found.reader.tensors
    base = found.reader
    if found.opened is None or _EMBEDDING not in tensors or "tie_word_embeddings" not in found.model.config:
        raise CheckpointError(f"{base.path}: has no output projection that could be tied to an embedding or untied")
    kept = {name: same(base, name) for name in tensors if name != _HEAD}
    if head == "untie":
        kept[_HEAD] = same(base, _EMBEDDING, replace(tensors[_EMBEDDING], name=_HEAD))
    elif _HEAD in tensors:
        _check_equal(base)
    config = {**found.model.config, "tie_word_embeddings": head == "tie"}
    model = ModelEntry(found.model.family, found.model.names, found.model.architecture, config, None, found.model.units)
    axes = dict(found.axes)
    if head == "untie":
        axes[_HEAD] = axes[_EMBEDDING]
    return replace(found, reader=DerivedReader(base, kept, config=config), model=model, axes=axes)


def _check_equal(base: Reader) -> None:
    head, embedding = base.tensors[_HEAD], base.tensors[_EMBEDDING]
    if head.shape != embedding.shape or head.dtype != embedding.dtype:
        raise CheckpointError(f"{base.path}: {head} is not {embedding}; they cannot be tied")
    rows = max(1, (16 << 20) // max(1, head.shape[1] * head.dtype.itemsize))
    for start in range(0, head.shape[0], rows):
        piece = (slice(start, start + rows),)
        if base.read(_HEAD, piece).tobytes() != base.read(_EMBEDDING, piece).tobytes():
            raise CheckpointError(
                f"{base.path}: {head} and {embedding} differ from row {start} on; they cannot be tied"
            )
