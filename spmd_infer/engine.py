"""The engine: a model's weights on a mesh of devices, and ``infer``.

An engine is a plan (``planning``), the weights laid out by it, and a ``BatchRunner`` that takes batches of any size
through programs compiled for a few: a batch is checked against the model's signature, cut into micro-batches, padded to
buckets, run, cut back to its rows and put together. ``jit`` compiles other functions of the model; tasks use it, and
``TaskVerbs`` gives them their names on the engine: ``generate``, ``embed`` and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from spmd_infer.aggregate import Aggregate
from spmd_infer.axes import AxisRules
from spmd_infer.batching import Buckets
from spmd_infer.ensemble import ensemble
from spmd_infer.errors import CheckpointError
from spmd_infer.functional import ModelFunction, Params, model_function
from spmd_infer.memory import MemoryUse, memory_use
from spmd_infer.model_program import ModelProgram
from spmd_infer.opening import OpenedModel, open_model
from spmd_infer.pipeline import own_layouts, resolve_stages, stacked, unstacked
from spmd_infer.placement import Placement, placed
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.resolve import MeshLike, PlanRequest, platform_of
from spmd_infer.planning.workload import Workload
from spmd_infer.programs import Program, Programs
from spmd_infer.runner import BatchRunner, Results
from spmd_infer.signature import Signature
from spmd_infer.staging import base_axes, base_function, stage_count
from spmd_infer.task_table import KeepsArrays
from spmd_infer.task_verbs import TaskVerbs
from spmd_infer.tensors import Axes
from spmd_infer.transfer import put

if TYPE_CHECKING:
    from spmd_infer.checkpoints import Reader
    from spmd_infer.models.registry import Family, ModelConfig


class Engine(TaskVerbs):
    """A model on a mesh.

    Args:
        model: an NNX module, a Linen module, or a function ``fn(params, batch)``.
        params: Linen variables, the function's parameters, or replacements for the NNX module's own.
        mesh: ``"auto"``, ``"data=2,model=4"``, a ``MeshSpec``, a ``MeshPlan`` or a ``jax.sharding.Mesh``.
        example: a batch, from which the inputs' structure, shapes and dtypes are learnt. Without it and without
            ``inputs`` they are learnt from the first batch.
        inputs: a pytree of ``InputSpec`` instead, for dimensions besides the batch that vary.
        workload: the traffic that ``mesh="auto"`` plans for.
        buckets: batch sizes to compile for; default powers of two times the data axis, up to 64.
        rules: where logical axes go on the mesh.
        call_kwargs: fixed keyword arguments of the model, such as ``{"train": False}``.

    Raises:
        ModelError: the model cannot be run, or the parameters are not its own.
        PlanError: no mesh works; ``DoesNotFitError`` where memory is what is missing.
    """

    def __init__(
        self,
        model: Any,
        params: Any = None,
        *,
        mesh: MeshLike = "auto",
        example: Any = None,
        inputs: Any = None,
        workload: Workload | None = None,
        buckets: Sequence[int] | None = None,
        rules: AxisRules | None = None,
        call_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        function = model if isinstance(model, ModelFunction) else model_function(model, params, call_kwargs=call_kwargs)
        signature = Signature(inputs) if inputs is not None else None
        if example is not None and signature is None:
            signature = Signature.from_example(example)
        values = base_function(function).params
        inputs = signature.inputs if signature is not None else None
        function, plan, built = resolve_stages(mesh, PlanRequest(function, inputs, workload, rules))
        self._set_up(placed(function, plan, built, values), signature, buckets, rules, workload)

    def _set_up(
        self,
        placement: Placement,
        signature: Signature | None,
        buckets: Sequence[int] | None,
        rules: AxisRules | None,
        workload: Workload | None,
        opened: OpenedModel | None = None,
    ) -> None:
        self._placement, self._opened = placement, opened
        self._asked_rules, self._workload = rules, workload
        self._programs = Programs(placement)
        self._asked_buckets = buckets
        self._runner = BatchRunner(self._programs, signature, self._make_buckets())
        self._tasks: dict[str, Any] = {}
        if placement.mesh.is_multi_process:
            from spmd_infer.multihost.fingerprint import agree, of_placement
            from spmd_infer.multihost.job import this_job

            agree(this_job(), "the engine", of_placement(placement, self._runner.buckets, opened))

    def _make_buckets(self) -> Buckets:
        asked, parts = self._asked_buckets, self.data_parts
        return Buckets.of(asked, parts) if asked else Buckets.default(parts)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mesh: MeshLike = "auto",
        dtype: Any = None,
        workload: Workload | None = None,
        buckets: Sequence[int] | None = None,
        rules: AxisRules | None = None,
        verify: Literal["full", "fast", "off"] = "full",
        quantize: str | None = None,
    ) -> Engine:
        """Read a checkpoint of a zoo model straight onto a mesh.

        Args:
            path: a Hugging Face or native folder, a ``.safetensors``, ``.gguf`` or ``.pth`` file, or the name of a
                packaged demo such as ``demo:smollm2``.
            mesh: as for ``Engine``.
            dtype: load floating-point weights in this dtype; default as stored, quantised ones in float32 on CPU and
                bfloat16 elsewhere.
            workload: as for ``Engine``.
            buckets: as for ``Engine``.
            rules: as for ``Engine``.
            verify: for native checkpoints, which carry digests: ``"full"`` compares all that is read with them,
                ``"fast"`` only sizes and a sample, ``"off"`` only sizes.
            quantize: hold the weights of projections and of the head as ``"int8"``, ``"fp8"``, ``"int4"`` or
                ``"int4:GROUP"``, made so one by one as they are read. The others are in ``dtype``, by default float32
                on CPU and bfloat16 elsewhere.

        Raises:
            CheckpointError: the checkpoint is damaged or incomplete.
            ModelError: no model family answers to it, or the format is unknown.
            DoesNotFitError: the devices have too little memory; nothing has been read then.
        """
        from spmd_infer.quantised_loading import load_weights

        opened = open_model(path, dtype, platform=platform_of(mesh), verify=verify, quantize=quantize)
        function, plan, built = _resolve(mesh, opened.model, opened.inputs, workload, rules, opened)
        abstract = own_layouts(function, plan.weights, built)
        loaded = load_weights(opened, abstract)
        engine = cls.__new__(cls)
        placement = Placement(function, plan, built, dict(stacked(function, plan.weights, built, loaded)))
        engine._set_up(placement, Signature(opened.inputs), buckets, rules, workload, opened)
        return engine

    def reshard(self, mesh: MeshLike) -> MeshPlan:
        """Move the live weights to another mesh or plan, device to device, without reading the checkpoint again.

        Weights move one after the other, so devices hold only few of them twice. Programs compiled before are kept:
        back on an earlier mesh nothing is compiled again. Keys and values of earlier prompts are let go. Must not run
        while another thread uses the engine.

        Args:
            mesh: as for ``Engine``.

        Returns:
            The new plan.

        Raises:
            MeshError: the mesh cannot be built.
            PlanError: the model does not fit there. In both cases nothing has moved.
        """
        signature = self._runner.signature
        function, plan, built = _resolve(
            mesh,
            base_function(self._placement.model),
            signature.inputs if signature is not None else None,
            self._workload,
            self._asked_rules,
            self._opened,
        )
        self._placement.move(function, plan, built)
        self._runner.buckets = self._make_buckets()
        for task in self._tasks.values():
            if isinstance(task, KeepsArrays):
                task.mesh_changed()
        return plan

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save the weights as a native checkpoint, which ``Engine.load`` reads onto any mesh.

        In a job of several processes all of them call this; each writes what its own devices hold.

        Raises:
            CheckpointError: the weights were quantised at load; the path exists and may not be overwritten, another
                process saves there, or it cannot be written. What was there before is then as it was.
        """
        from spmd_infer.checkpoints import save
        from spmd_infer.conversion import entry_of

        if self._opened is not None and self._opened.weight_format is not None:
            raise CheckpointError(
                f"these weights were made {self._opened.weight_format} while they were read, and are not saved so; "
                "save them from an engine without quantize, or use spmd-infer convert --quantise"
            )
        model = entry_of(self.family, self.config, self.reader) if self.family and self.config else None
        own = unstacked(self._placement.model, self.params)
        save(own, path, axes=base_axes(self._placement.model), model=model, source=self.reader, overwrite=overwrite)

    @classmethod
    def ensemble(
        cls,
        model: Any,
        members: Sequence[Any],
        *,
        aggregate: Aggregate | Callable[[Any], Any],
        mesh: MeshLike = "auto",
        **options: Any,
    ) -> Engine:
        """Several parameter sets of one model, held along the mesh axis ``member`` and combined on the devices.

        Args:
            model: the model that all members share.
            members: parameters of each member, as ``params`` of ``Engine``.
            aggregate: how the members' results become one: ``Mean()``, ``WeightedMean(w)``, ``MajorityVote()``,
                ``Max()``, ``Min()``, ``Concat()`` for ``[batch, members, ...]``, or a traced function of
                ``[members, batch, ...]``.
            mesh: as for ``Engine``, such as ``"member=4,data=2"``.
            **options: as for ``Engine``.
        """
        call_kwargs = options.pop("call_kwargs", None)
        parts = [model_function(model, params, call_kwargs=call_kwargs) for params in members]
        return cls(ensemble(parts, aggregate), mesh=mesh, **options)

    def infer(
        self, batch: Any, *, aggregate: Aggregate | Callable[[Any], Any] | None = None, results: Results = "all"
    ) -> Any:
        """Run the model on a batch of any size.

        Args:
            batch: a pytree of arrays, each with the rows as its first dimension. In a job of several processes all of
                them call this, and the batch is rank 0's; what the others give is not looked at, and may be None.
            aggregate: how the rows' results become one; default keeps every row. A callable gets the results of all
                rows, on the host.
            results: in a job of several processes, who gets them: ``"all"``, ``"first"`` for rank 0 (the others get
                None), or ``"placed"`` for ``jax.Array`` that stay on the devices that computed them.

        Returns:
            The model's outputs, numpy arrays with the rows in the input's order. They may be read-only.

        Raises:
            BatchError: the batch is not what the model takes; the engine stays usable.
        """
        (result,) = self.infer_stream((batch,), aggregate=aggregate, results=results)
        return result

    def infer_local(self, batch: Any) -> Any:
        """As ``infer`` in a job of several processes, but every rank gives rows of its own and gets their results.

        No row travels between processes. Ranks may have different numbers of rows, each at least one.

        Args:
            batch: this rank's rows.

        Returns:
            Their results, numpy arrays.

        Raises:
            BatchError: a rank's batch is not what the model takes, or the mesh does not split rows by process. All
                ranks raise it.
        """
        if not self.mesh.is_multi_process:
            return self.infer(batch)
        from spmd_infer.multihost.job import this_job
        from spmd_infer.multihost.local_batches import infer_local

        return infer_local(this_job(), self._runner, batch)

    def infer_stream(
        self,
        batches: Iterable[Any],
        *,
        aggregate: Aggregate | Callable[[Any], Any] | None = None,
        results: Results = "all",
    ) -> Iterator[Any]:
        """Run the model on one batch after another; the next is prepared while the devices work on the last.

        Args:
            batches: batches as for ``infer``; at most two are held at a time. In a job of several processes every rank
                takes the results to the end.
            aggregate: as for ``infer``, for each batch on its own.
            results: as for ``infer``.

        Yields:
            The result of each batch, in order.

        Raises:
            BatchError: a batch is not what the model takes. The results of those before it have been yielded.
        """
        if self.mesh.is_multi_process:
            from spmd_infer.multihost.batches import ending_together, shared_batches
            from spmd_infer.multihost.job import this_job

            batches = shared_batches(this_job(), batches)
            return ending_together(self._runner.run(batches, aggregate, results), batches)
        return self._runner.run(batches, aggregate, results)

    def warmup(self, sizes: Mapping[str, int | Sequence[int]] | None = None, *, quiet: bool = False) -> int:
        """Compile the programs for every bucket now, several at a time.

        Args:
            sizes: for inputs with other varying dimensions, the sizes to compile for: ``{"seq": (128, 256)}``.
            quiet: show no progress.

        Returns:
            How many programs were compiled.

        Raises:
            BatchError: the inputs are not known yet, or a varying dimension has no size.
        """
        return self._runner.warmup(sizes or {}, quiet=quiet)

    def jit(
        self,
        name: str,
        fn: Callable[..., Any],
        *,
        donate: tuple[int, ...] = (),
        out_axes: Any = None,
        phase: str | None = None,
    ) -> ModelProgram:
        """A function of the model, compiled for the mesh: what tasks are built from.

        Args:
            name: names the function; two functions of one engine must not share it, nor two that close over different
                values. Without arrays as arguments, functions whose results differ in shape or dtype may share it.
            fn: ``fn(model, *args)``, traced with the rebuilt model.
            donate: positions in ``args`` whose memory may be reused.
            out_axes: logical axes of the results, a pytree prefix with tuples for leaves; None lets XLA choose.
            phase: ``prefill`` or ``decode``, for plans that lay these out differently.

        Returns:
            Called, it dispatches at once. Compiled once for each combination of shapes and dtypes, and counted.
            Arrays stay where ``place`` put them; numpy arrays are given whole to every device.
        """
        return ModelProgram(self._programs, name, fn, donate=donate, out_axes=out_axes, phase=phase)

    def place(self, array: Any, axes: Axes, *, phase: str | None = None) -> jax.Array:
        """Put an array on the mesh by its logical axes; a ``jax.ShapeDtypeStruct`` is made of zeros on the devices."""
        sharding = self._placement.sharding(axes, array.shape, phase)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jnp.zeros(array.shape, array.dtype, device=sharding)
        return put(array, sharding)

    @property
    def plan(self) -> MeshPlan:
        """How the model lies on the mesh, and why."""
        return self._placement.plan

    @property
    def mesh(self) -> Mesh:
        """The mesh."""
        return self._placement.mesh

    @property
    def rules(self) -> AxisRules:
        """Where logical axes go."""
        return self._placement.rules()

    @property
    def params(self) -> Params:
        """The weights on the mesh, by path."""
        return self._placement.params

    @property
    def data_parts(self) -> int:
        """Into how many parts the rows of a batch are split; batch sizes are multiples of it."""
        return self._placement.row_parts

    @property
    def stages(self) -> int:
        """Over how many stages the layers are spread; 1 where they are not."""
        return stage_count(self._placement.model)

    @property
    def buckets(self) -> Buckets:
        """The batch sizes that programs are compiled for."""
        return self._runner.buckets

    @property
    def family(self) -> Family | None:
        """The family of a zoo model; None for a model of the caller's own."""
        return self._opened.family if self._opened else None

    @property
    def config(self) -> ModelConfig | None:
        """The sizes of a zoo model; None for a model of the caller's own."""
        return self._opened.config if self._opened else None

    @property
    def reader(self) -> Reader | None:
        """The checkpoint of a zoo model; None for a model of the caller's own."""
        return self._opened.reader if self._opened else None

    @property
    def programs(self) -> list[Program]:
        """The programs compiled so far, for a look at their HLO and memory."""
        return self._programs.finished()

    @property
    def compiles(self) -> int:
        """Programs compiled so far."""
        return self._programs.compiles

    @property
    def compile_seconds(self) -> float:
        """Seconds spent compiling them."""
        return self._programs.compile_seconds

    @property
    def dtype(self) -> Any:
        """The dtype that a zoo model computes in; of others that of most of the weights' bytes, small numbers aside."""
        if self._opened is not None:
            return self._opened.dtype
        sizes: dict[Any, int] = {}
        for weight in self.params.values():
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.nbytes
        wide = [dtype for dtype in sizes if dtype.itemsize > 1] or [*sizes]
        return max(wide, key=lambda dtype: sizes[dtype])

    def memory(self) -> MemoryUse:
        """Bytes that each device holds: weights, and the scratch memory of the hungriest program compiled so far."""
        return memory_use(self.params, self._programs.finished())


def _resolve(
    mesh: MeshLike,
    model: ModelFunction,
    inputs: Any,
    workload: Workload | None,
    rules: AxisRules | None,
    opened: OpenedModel | None,
) -> tuple[ModelFunction, MeshPlan, Mesh]:
    """The plan and mesh for a model, with the phases and units that a checkpoint's family knows."""
    if opened is None:
        return resolve_stages(mesh, PlanRequest(model, inputs, workload, rules))
    traffic = opened.workload(workload or Workload())
    phases, units = opened.phases(traffic), opened.config.axis_units()
    shallow = opened.shallow(traffic)
    request = PlanRequest(model, inputs, traffic, rules, phases, units, shallow)
    function, plan, built = resolve_stages(mesh, request)
    notes = tuple(note for note in opened.notes if note not in plan.notes)
    return function, replace(plan, notes=(*plan.notes, *notes)), built
