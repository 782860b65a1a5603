"""The engine: a model's weights on a mesh of devices, and ``infer``.

One call, in order: the batch is checked against the model's signature, cut into micro-batches and padded to buckets,
handed to the programs compiled for those buckets, and what comes back is cut to the batch's rows and put together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from spmd_infer.aggregate import Aggregate, Concat, Partial
from spmd_infer.axes import BATCH, AxisRules
from spmd_infer.batching import Buckets, pad_rows
from spmd_infer.ensemble import ensemble
from spmd_infer.errors import BatchError, TaskError
from spmd_infer.functional import ModelFunction, Params, model_function
from spmd_infer.inference import InferProgram, infer_program
from spmd_infer.memory import MemoryUse, memory_use
from spmd_infer.mesh import MeshSpec, auto_mesh, axis_size, spec_of
from spmd_infer.opening import OpenedModel, open_model
from spmd_infer.planning.hardware import found_cluster
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.search import Workload, make_plan
from spmd_infer.programs import Programs
from spmd_infer.progress import progress
from spmd_infer.signature import CheckedBatch, Signature
from spmd_infer.task_table import find_task
from spmd_infer.tensors import Axes

if TYPE_CHECKING:
    from spmd_infer.checkpoints import Reader
    from spmd_infer.models.registry import Family, ModelConfig

MeshLike = str | MeshSpec | MeshPlan | Mesh
IN_FLIGHT = 2
"""Programs dispatched before the first one's results are read: one runs while the host prepares the next."""


class Engine:
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
        function = (
            model if isinstance(model, ModelFunction) else model_function(model, params, call_kwargs=call_kwargs)
        )
        signature = Signature(inputs) if inputs is not None else None
        if example is not None and signature is None:
            signature = Signature.from_example(example)
        plan, built = resolve_mesh(mesh, function, signature.inputs if signature else None, workload, rules)
        weights = {
            layout.path: jax.device_put(function.params[layout.path], NamedSharding(built, layout.spec))
            for layout in plan.weights
        }
        self._set_up(function, weights, plan, built, signature, buckets)

    def _set_up(
        self,
        function: ModelFunction,
        weights: Params,
        plan: MeshPlan,
        mesh: Mesh,
        signature: Signature | None,
        buckets: Sequence[int] | None,
        opened: OpenedModel | None = None,
    ) -> None:
        self.plan, self.mesh, self.rules, self.params = plan, mesh, plan.rules, weights
        self.data_parts = axis_size(dict(mesh.shape), plan.rules.mesh_axis(BATCH))
        self.buckets = Buckets.of(buckets, self.data_parts) if buckets else Buckets.default(self.data_parts)
        self.family: Family | None = opened.family if opened else None
        self.config: ModelConfig | None = opened.config if opened else None
        self.reader: Reader | None = opened.reader if opened else None
        self._model = function
        self._signature = signature
        self._programs = Programs(mesh, plan.rules)
        self._infer_programs: dict[Any, InferProgram] = {}
        self._tasks: dict[str, Any] = {}

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
    ) -> Engine:
        """Read a checkpoint of a zoo model straight onto a mesh.

        Args:
            path: a Hugging Face folder, or a ``.safetensors``, ``.gguf`` or ``.pth`` file.
            mesh: as for ``Engine``.
            dtype: load floating-point weights in this dtype; default as stored, quantised ones in float32 on CPU and
                bfloat16 elsewhere.
            workload: as for ``Engine``.
            buckets: as for ``Engine``.
            rules: as for ``Engine``.

        Raises:
            CheckpointError: the checkpoint is damaged or incomplete.
            ModelError: no model family answers to it.
            DoesNotFitError: the devices have too little memory; nothing has been read then.
        """
        from spmd_infer.checkpoints import load_onto

        opened = open_model(path, dtype, platform=platform_of(mesh))
        units = (rules or AxisRules()).with_units(opened.config.axis_units())
        traffic = opened.workload(workload or Workload())
        plan, built = resolve_mesh(mesh, opened.model, opened.inputs, traffic, units)
        abstract = {
            layout.path: jax.ShapeDtypeStruct(layout.shape, layout.dtype, sharding=NamedSharding(built, layout.spec))
            for layout in plan.weights
        }
        weights = load_onto(opened.reader, opened.table, abstract)
        engine = cls.__new__(cls)
        engine._set_up(opened.model, weights, plan, built, Signature(opened.inputs), buckets, opened)
        return engine

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
            aggregate: how the members' results become one: ``Mean()``, ``WeightedMean(w)``, ``MajorityVote()``, ``Max()``,
                ``Min()``, ``Concat()`` for ``[batch, members, ...]``, or a traced function of ``[members, batch, ...]``.
            mesh: as for ``Engine``, such as ``"member=4,data=2"``.
            **options: as for ``Engine``.
        """
        call_kwargs = options.pop("call_kwargs", None)
        parts = [model_function(model, params, call_kwargs=call_kwargs) for params in members]
        return cls(ensemble(parts, aggregate), mesh=mesh, **options)

    def infer(self, batch: Any, *, aggregate: Aggregate | Callable[[Any], Any] | None = None) -> Any:
        """Run the model on a batch of any size.

        Args:
            batch: a pytree of arrays, each with the rows as its first dimension.
            aggregate: how the rows' results become one; default keeps every row. A callable gets the results of all
                rows, on the host.

        Returns:
            The model's outputs, numpy arrays with the rows in the input's order. They may be read-only.

        Raises:
            BatchError: the batch is not what the model takes; the engine stays usable.
        """
        return next(self.infer_stream((batch,), aggregate=aggregate))

    def infer_stream(
        self, batches: Iterable[Any], *, aggregate: Aggregate | Callable[[Any], Any] | None = None
    ) -> Iterator[Any]:
        """Run the model on one batch after another; the next is prepared while the devices work on the last.

        Args:
            batches: batches as for ``infer``; at most two are held at a time.
            aggregate: as for ``infer``, for each batch on its own.

        Yields:
            The result of each batch, in order.

        Raises:
            BatchError: a batch is not what the model takes. The results of those before it have been yielded.
        """
        reduce = aggregate if isinstance(aggregate, Aggregate) and not isinstance(aggregate, Concat) else None
        after = aggregate if aggregate is not None and not isinstance(aggregate, Aggregate) else None
        waiting: deque[tuple[int, int, Any]] = deque()  # (rows of this piece, rows of its batch still to come, results)
        pieces: list[Any] = []
        failure: BatchError | None = None
        dispatches = self._dispatches(batches, reduce)
        while True:
            while failure is None and len(waiting) < IN_FLIGHT:
                try:
                    dispatched = next(dispatches, None)
                except BatchError as error:
                    failure = error
                    break
                if dispatched is None:
                    break
                waiting.append(dispatched)
            if not waiting:
                break
            rows, left, results = waiting.popleft()
            fetched = jax.device_get(results)
            pieces.append(fetched if reduce else jax.tree.map(lambda x, n=rows: x if len(x) == n else x[:n], fetched))
            if left == 0:
                whole, pieces = _together(pieces, reduce), []
                yield whole if after is None else after(whole)
        if failure is not None:
            raise failure

    def _dispatches(self, batches: Iterable[Any], reduce: Aggregate | None) -> Iterator[tuple[int, int, Any]]:
        for batch in batches:
            if self._signature is None:
                self._signature = Signature.from_example(batch)
            checked = self._signature.check(batch)
            weights = reduce.weights(checked.rows) if reduce is not None else None
            for start, stop, bucket in self.buckets.split(checked.rows):
                leaves = [
                    pad_rows(leaf, start, stop, bucket) if BATCH in spec.shape else leaf
                    for leaf, spec in zip(checked.leaves, checked.specs, strict=True)
                ]
                row_weights = None
                if weights is not None:
                    row_weights = np.zeros(bucket, np.float32)
                    row_weights[: stop - start] = weights[start:stop]
                program = self._infer_program(checked, leaves, bucket, reduce)
                yield stop - start, checked.rows - stop, program(self.params, leaves, row_weights)

    def _infer_program(
        self, checked: CheckedBatch, leaves: Sequence[Any], bucket: int, reduce: Aggregate | None
    ) -> InferProgram:
        # The caller's own device arrays must survive the call; memory that the engine made may be reused.
        donate = not any(isinstance(leaf, jax.Array) for leaf in leaves)
        key = (checked.treedef, *[leaf.shape for leaf in leaves], type(reduce), donate)
        found = self._infer_programs.get(key)
        if found is None:
            found = infer_program(self._programs, self._model, self.params, checked, bucket, reduce, donate)
            self._infer_programs[key] = found
        return found

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
        if self._signature is None:
            raise BatchError("the inputs are not known yet: give the engine example= or inputs=, or call infer once")
        before = self.compiles
        batches = [
            batch for bucket in self.buckets.sizes for batch in self._signature.blank_batches(bucket, sizes or {})
        ]
        with ThreadPoolExecutor(max_workers=4) as pool, progress("compiling", len(batches), quiet=quiet) as advance:
            for _ in pool.map(self._compile_for, batches):
                advance(1)
        return self.compiles - before

    def _compile_for(self, batch: Any) -> None:
        assert self._signature is not None
        checked = self._signature.check(batch)
        self._infer_program(checked, checked.leaves, checked.rows, None)

    def jit(
        self, name: str, fn: Callable[..., Any], *, donate: tuple[int, ...] = (), out_axes: Any = None
    ) -> Callable[..., Any]:
        """A function of the model, compiled for the mesh: what tasks are built from.

        Args:
            name: names the function; two functions of one engine must not share it.
            fn: ``fn(model, *args)``, traced with the rebuilt model.
            donate: positions in ``args`` whose memory may be reused.
            out_axes: logical axes of the results, a pytree prefix with tuples for leaves; None lets XLA choose.

        Returns:
            ``g(*args)``: dispatches at once. Compiled once for each combination of shapes and dtypes, and counted.
            Arrays stay where ``place`` put them; numpy arrays are given whole to every device.
        """
        whole = NamedSharding(self.mesh, jax.sharding.PartitionSpec())

        def run(params: Params, *args: Any) -> Any:
            result = fn(self._model.rebuild(params), *args)
            return result if out_axes is None else self._constrained(result, out_axes)

        def call(*args: Any) -> Any:
            leaves, treedef = jax.tree_util.tree_flatten(args)
            key = (name, treedef, *[(leaf.shape, leaf.dtype, getattr(leaf, "sharding", None)) for leaf in leaves])
            program = self._programs.find(key)
            if program is None:
                shardings = treedef.unflatten([getattr(leaf, "sharding", whole) for leaf in leaves])
                weights = jax.tree.map(lambda w: w.sharding, self.params)
                program = self._programs.get(
                    key,
                    run,
                    (self.params, *args),
                    name=name,
                    in_shardings=(weights, *shardings),
                    donate=tuple(position + 1 for position in donate),
                )
            return program.compiled(self.params, *args)

        return call

    def place(self, array: Any, axes: Axes) -> jax.Array:
        """Put an array on the mesh by its logical axes; a ``jax.ShapeDtypeStruct`` is made of zeros on the devices."""
        sharding = NamedSharding(self.mesh, self.rules.resolve(axes, array.shape, dict(self.mesh.shape)).spec)
        if isinstance(array, jax.ShapeDtypeStruct):
            return jnp.zeros(array.shape, array.dtype, device=sharding)
        return jax.device_put(array, sharding)

    def _constrained(self, result: Any, out_axes: Any) -> Any:
        def one(axes: Axes, part: Any) -> Any:
            return jax.tree.map(
                lambda x: jax.lax.with_sharding_constraint(
                    x, NamedSharding(self.mesh, self.rules.resolve(axes, x.shape, dict(self.mesh.shape)).spec)
                ),
                part,
            )

        return jax.tree.map(one, out_axes, result, is_leaf=lambda node: _is_axes(node))

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
        """The dtype of most of the weights' bytes."""
        sizes: dict[Any, int] = {}
        for weight in self.params.values():
            sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.nbytes
        return max(sizes, key=lambda dtype: sizes[dtype])

    def memory(self) -> MemoryUse:
        """Bytes that each device holds: weights, and the scratch memory of the hungriest program compiled so far."""
        return memory_use(self.params, self._programs.finished())

    def task(self, name: str) -> Any:
        """The engine's task of that name, built on first use.

        Raises:
            TaskError: there is no such task, or this model does not offer it.
        """
        if name not in self._tasks:
            task = find_task(name)
            if self.family is None or self.family.task != name:
                what = f"{self.family.name} models offer {self.family.task!r}" if self.family else "this is a model of your own"
                raise TaskError(f"the loaded model cannot {name}: {what}; infer() takes tensors")
            self._tasks[name] = task(self)
        return self._tasks[name]

    def embed(self, texts: Any, **options: Any) -> Any:
        """Embed texts; see ``spmd_infer.tasks.embed.Embed``."""
        return self.task("embed")(texts, **options)

    def classify(self, images: Any, **options: Any) -> Any:
        """Classify images; see ``spmd_infer.tasks.classify.Classify``."""
        return self.task("classify")(images, **options)

    def generate(self, prompts: Any, params: Any = None, **options: Any) -> Any:
        """Continue prompts; see ``spmd_infer.tasks.generate.Generate``."""
        return self.task("generate")(prompts, params, **options)


def resolve_mesh(
    mesh: MeshLike, model: ModelFunction, inputs: Any, workload: Workload | None, rules: AxisRules | None
) -> tuple[MeshPlan, Mesh]:
    """The plan for what the caller said of the mesh, and the mesh itself."""
    if isinstance(mesh, MeshPlan):
        mesh, rules = mesh.mesh, rules or mesh.rules
    if isinstance(mesh, Mesh):
        built = auto_mesh(mesh)
        cluster = found_cluster(list(built.devices.flat))
        return make_plan(model, cluster, inputs=inputs, workload=workload, rules=rules, mesh=spec_of(built)), built
    if mesh == "auto":
        plan = make_plan(model, found_cluster(jax.devices()), inputs=inputs, workload=workload, rules=rules)
        return plan, plan.build()
    spec = MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
    built = spec.build()
    cluster = found_cluster(list(built.devices.flat))
    return make_plan(model, cluster, inputs=inputs, workload=workload, rules=rules, mesh=spec), built


def platform_of(mesh: MeshLike) -> str:
    """The platform of the devices that a mesh will use."""
    device = mesh.devices.flat[0] if isinstance(mesh, Mesh) else jax.devices()[0]
    return str(device.platform)


def _together(pieces: list[Any], reduce: Aggregate | None) -> Any:
    """One result from those of the micro-batches."""
    if reduce is None:
        return pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
    leaves, treedef = jax.tree_util.tree_flatten(pieces[0], is_leaf=_is_partial)
    total = leaves
    for piece in pieces[1:]:
        total = [reduce.merge(a, b) for a, b in zip(total, treedef.flatten_up_to(piece), strict=True)]
    return treedef.unflatten([reduce.finish(leaf) for leaf in total])


def _is_partial(node: Any) -> bool:
    return isinstance(node, Partial)


def _is_axes(node: Any) -> bool:
    return isinstance(node, tuple) and all(entry is None or isinstance(entry, str) for entry in node)
