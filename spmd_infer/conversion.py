"""A checkpoint as its model's parameters: what converting, resharding and saving know of it beyond its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spmd_infer.checkpoints.derived import DerivedReader, by_parameter, by_stored_name
from spmd_infer.checkpoints.manifest import ModelEntry
from spmd_infer.checkpoints.native_reader import NativeReader
from spmd_infer.checkpoints.native_store import model_entry
from spmd_infer.checkpoints.reader import Reader
from spmd_infer.errors import CheckpointError, ModelError
from spmd_infer.models.registry import sizes_of
from spmd_infer.opening import OpenedModel, match_model
from spmd_infer.tensors import Axes

if TYPE_CHECKING:
    from spmd_infer.models.registry import Family, ModelConfig


@dataclass(frozen=True)
class Subject:
    """What is converted.

    Attributes:
        reader: the tensors, under the model's parameter paths where its family is known.
        model: what the new checkpoint will say of the model.
        axes: logical axes of the tensors that have any.
        opened: the model, where its family is known.
        note: why the family is not known; empty where it is.
    """

    reader: Reader
    model: ModelEntry
    axes: Mapping[str, Axes]
    opened: OpenedModel | None
    note: str = ""


def entry_of(family: Family, config: ModelConfig, reader: Reader | None) -> ModelEntry:
    """What a native checkpoint says of a zoo model."""
    known = dict(reader.config) if reader is not None else {}
    return ModelEntry(
        family=family.name,
        architecture=reader.architecture if reader is not None else None,
        config=known,
        sizes=None if known else sizes_of(config),
        units=dict(config.axis_units()),
    )


def subject(reader: Reader) -> Subject:
    """A checkpoint as the parameters of its model, or as it is where no family answers to it."""
    try:
        opened = match_model(reader)
        shapes = {path: tuple(value.shape) for path, value in opened.model.params.items()}
        parameters = by_parameter(reader, opened.table, shapes)
    except (ModelError, CheckpointError) as error:
        axes = reader.axes if isinstance(reader, NativeReader) else {}
        return Subject(reader, model_entry(reader), axes, None, str(error))
    return Subject(parameters, entry_of(opened.family, opened.config, reader), dict(opened.model.axes), opened)


def as_hugging_face(found: Subject) -> DerivedReader:
    """A model's parameters under the names of a Hugging Face folder, with its ``config.json``.

    Raises:
        CheckpointError: the family is not known, or has no such names.
    """
    if found.opened is None:
        raise CheckpointError(
            f"{found.reader.path}: cannot be written as a Hugging Face folder: {found.note or 'unknown family'}"
        )
    config = hugging_face_config(found.opened)
    try:
        table = found.opened.family.name_table(found.opened.config, "safetensors")
    except ModelError as error:
        raise CheckpointError(f"{found.reader.path}: cannot be written as safetensors: {error}") from error
    architecture = config.get("architectures", [None])[0]
    return by_stored_name(found.reader, table, config=config, architecture=architecture)


def hugging_face_config(opened: OpenedModel) -> dict[str, Any]:
    """The ``config.json`` of a model; what GGUF files say in other words is put into those of Hugging Face."""
    config = dict(opened.reader.config) or sizes_of(opened.config)
    scaling = config.get("rope_scaling") or {}
    if scaling.get("rope_type") == "frequency_factors":
        raise CheckpointError(
            f"{opened.reader.path}: gives a factor for each rotary frequency, which a config.json cannot say"
        )
    names = opened.family.architectures
    said = config.get("architectures") or [opened.reader.architecture]
    if not said or said[0] not in names or said[0] == names[-1]:
        config["architectures"] = [names[0]]
    config.setdefault("model_type", opened.family.name)
    return config
