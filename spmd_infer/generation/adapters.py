"""LoRA adapters on the devices: a fixed number of places, loaded and dropped while requests run.

The arrays have room for ``max_adapters`` of rank ``max_adapter_rank`` from the first load on, so that programs stay the
same whatever is loaded. A step in which some row has an adapter is another program than one in which none has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from spmd_infer.checkpoints.lora import LoraAdapter
from spmd_infer.errors import CheckpointError, TaskError
from spmd_infer.generation.batches import Layout
from spmd_infer.models.adapters import AdapterTable, Projection, RowAdapters, projections

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

_MERGE = "merge it into the weights with spmd-infer convert --lora"


@dataclass(eq=False)
class Adapter:
    """One that is loaded.

    Attributes:
        name: what requests call it.
        slot: its place in the arrays.
        namespace: tells its prompts' keys and values from those of every other, also of one of the same name before.
        rank: the largest rank of its parts.
        users: requests that have not ended; counted by those who run them.
        dropped: whether new requests are refused. Its place is free once there are no users.
    """

    name: str
    slot: int
    namespace: str
    rank: int
    users: int = 0
    dropped: bool = False

    @property
    def gone(self) -> bool:
        """Whether its place may be another's by now."""
        return self.dropped and not self.users


class Adapters:
    """The adapters of one engine's model.

    Args:
        engine: holds the model; its family names the weights as Hugging Face does.
        max_adapters: how many may be loaded at a time.
        max_rank: the largest rank.
    """

    def __init__(self, engine: Engine, max_adapters: int, max_rank: int) -> None:
        self._engine, self._most, self._max_rank = engine, max_adapters, max_rank
        self._loaded: dict[int, Adapter] = {}  # by slot
        self._numbers = count()
        self._projections: dict[str, Projection] = {}
        self._tables: dict[str, AdapterTable] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """Those that requests may use, in the order of their places."""
        return tuple(each.name for _, each in sorted(self._loaded.items()) if not each.dropped)

    @property
    def any_loaded(self) -> bool:
        """Whether there has been one: their arrays exist from then on."""
        return bool(self._tables)

    def find(self, name: str) -> Adapter:
        """The adapter of that name.

        Raises:
            TaskError: there is none; the message names those that there are.
        """
        found = next((each for each in self._loaded.values() if each.name == name and not each.dropped), None)
        if found is None:
            loaded = ", ".join(self.names) or "none is loaded"
            raise TaskError(f"there is no adapter {name!r}; loaded: {loaded}")
        return found

    def load(self, name: str, lora: LoraAdapter) -> Adapter:
        """Read an adapter into a free place.

        Args:
            name: what requests will call it.
            lora: the opened adapter.

        Raises:
            TaskError: the name is taken, no place is free, or a rank is too large.
            CheckpointError: the adapter is not one for this model, or holds numbers that are not finite.
        """
        slot, ranks = self._free_slot(name), {lora.rank(part) for part in lora.parts}
        if max(ranks) > self._max_rank:
            raise TaskError(
                f"adapter {name!r} has rank {max(ranks)}, more than max_adapter_rank={self._max_rank}; raise it in "
                "GenerationOptions"
            )
        new = self._read(lora)
        axes = {path: each.table_axes for path, each in self._projections.items()}
        if not self._tables:
            self._tables = self._engine.jit("adapters", lambda _: self._empty(), out_axes=axes, phase="decode")()
        insert = self._engine.jit("load_adapter", _inserted, donate=(0,), out_axes=axes, phase="decode")
        placed = jax.tree.map(lambda x, names: self._engine.place(x, names[1:], phase="decode"), new, axes)
        self._tables = insert(self._tables, placed, np.int32(slot))
        adapter = Adapter(name, slot, f"adapter {next(self._numbers)}", max(ranks))
        self._loaded[slot] = adapter
        return adapter

    def drop(self, name: str) -> None:
        """Refuse new requests for an adapter; its place is free once those that use it have ended.

        Raises:
            TaskError: there is no such adapter.
        """
        self.find(name).dropped = True

    def rows(self, layout: Layout, used: Sequence[Adapter | None]) -> RowAdapters | None:
        """What a step needs to know; None where no row has an adapter.

        Args:
            layout: the step's rows.
            used: the adapter of each entry.
        """
        if all(adapter is None for adapter in used):
            return None
        rows = layout.ints([-1 if adapter is None else adapter.slot for adapter in used], fill=-1)
        return RowAdapters(self._tables, rows)  # type: ignore[arg-type]  # numpy, as below

    def unused_rows(self, layout: Layout) -> RowAdapters | None:
        """The same for rows that nobody has, to compile programs for; None where nothing has been loaded yet."""
        if not self.any_loaded:
            return None
        return RowAdapters(self._tables, layout.ints([], fill=-1))  # type: ignore[arg-type]

    def mesh_changed(self) -> None:
        """Move the arrays to where the engine's model is now."""
        for path, table in self._tables.items():
            axes = self._projections[path].table_axes
            self._tables[path] = jax.tree.map(
                lambda x, names: self._engine.place(x, names, phase="decode"), table, axes
            )

    def _free_slot(self, name: str) -> int:
        if not name:
            raise TaskError("an adapter needs a name that is not empty")
        if name in self.names:
            raise TaskError(f"an adapter {name!r} is loaded already; drop it first")
        taken = {slot: each for slot, each in self._loaded.items() if not each.gone}
        free = next((slot for slot in range(self._most) if slot not in taken), None)
        if free is None:
            draining = sum(each.dropped for each in taken.values())
            waits = f", {draining} of them dropped and still used by requests" if draining else ""
            raise TaskError(
                f"max_adapters={self._most} are loaded{waits}; drop one, or raise max_adapters in GenerationOptions"
            )
        return free

    def _read(self, lora: LoraAdapter) -> dict[str, AdapterTable]:
        """An adapter's numbers for every projection, ranks filled up; zeros for those that it does not change."""
        paths, own = self._paths(lora), self._projections
        new = {path: self._zeros(each) for path, each in own.items()}
        for part in lora.parts:
            path = paths[part.module]
            into, out = own[path].in_features, own[path].out_features
            lora.check(part, (out, into), f"{path}.weight {[out, into]}")
            down, up = lora.read(part)
            if not (np.isfinite(down).all() and np.isfinite(up).all()):
                raise CheckpointError(f"{lora.path}: {part.module!r} holds numbers that are not finite")
            rank = len(down)
            new[path].down[:rank], new[path].up[:rank] = down, up.T
        return new

    def _paths(self, lora: LoraAdapter) -> Mapping[str, str]:
        """The model's path of each module that an adapter changes."""
        engine = self._engine
        assert engine.family is not None
        assert engine.config is not None
        if not self._projections:
            found = projections(engine.family.abstract(engine.config))
            absent = next((path for path in found if f"{path}.weight" not in engine.params), None)
            if absent is not None:
                raise TaskError(f"adapters need each layer's weights on all devices, and {absent} is on one stage's")
            self._projections = found
        table = engine.family.name_table(engine.config, "safetensors")
        by_module = {
            source.name.removesuffix(".weight"): path.removesuffix(".weight") for path, source in table.items()
        }
        paths = {}
        for part in lora.parts:
            path = by_module.get(part.module)
            if path is None:
                raise CheckpointError(f"{lora.path}: this model has no module {part.module!r}")
            if path not in self._projections:
                raise CheckpointError(
                    f"{lora.path}: changes {part.module!r}, a table; adapters of tables are not implemented, {_MERGE}"
                )
            paths[part.module] = path
        return paths

    def _zeros(self, projection: Projection) -> AdapterTable:
        def zeros(width: int) -> npt.NDArray[Any]:
            return np.zeros((self._max_rank, width), jnp.dtype(self._engine.dtype))

        return AdapterTable(zeros(projection.in_features), zeros(projection.out_features))  # type: ignore[arg-type]

    def _empty(self) -> dict[str, AdapterTable]:
        def zeros(width: int) -> jax.Array:
            return jnp.zeros((self._most, self._max_rank, width), self._engine.dtype)

        return {
            path: AdapterTable(zeros(p.in_features), zeros(p.out_features)) for path, p in self._projections.items()
        }


def open_together(engine: Engine, path: Path) -> LoraAdapter:
    """Open an adapter's folder; where there are several processes, all call this, and find the same files.

    Raises:
        CheckpointError: the adapter is damaged, or of a kind that is not implemented.
        ClusterError: processes find different ones.
    """
    if not engine.mesh.is_multi_process:
        return LoraAdapter.open(path)
    from spmd_infer.multihost.fingerprint import agree, of_checkpoint
    from spmd_infer.multihost.job import this_job

    try:
        found: LoraAdapter | CheckpointError = LoraAdapter.open(path)
    except CheckpointError as error:
        found = error
    files = str(found) if isinstance(found, CheckpointError) else of_checkpoint(path, found.weights.tensors)
    agree(this_job(), "the adapter", {"files": files})
    if isinstance(found, CheckpointError):
        raise found
    return found


def _inserted(
    _: Any, tables: dict[str, AdapterTable], new: dict[str, AdapterTable], slot: jax.Array
) -> dict[str, AdapterTable]:
    def put(table: jax.Array, own: jax.Array) -> jax.Array:
        written: jax.Array = jax.lax.dynamic_update_index_in_dim(table, own, slot, 0)
        return written

    inserted: dict[str, AdapterTable] = jax.tree.map(put, tables, new)
    return inserted
