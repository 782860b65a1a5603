"""The engine: a model's weights on a mesh of devices, and ``infer``.

An engine is a plan (``planning``), the weights laid out by it, and a ``BatchRunner`` that takes batches of any size
through programs compiled for a few: a batch is checked against the model's signature, cut into micro-batches, padded to
buckets, run, cut back to its rows and put together. ``jit`` compiles other functions of the model; tasks use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from spmd_infer.aggregate import Aggregate
from spmd_infer.axes import AxisRules
from spmd_infer.batching import Buckets
from spmd_infer.ensemble import ensemble
from spmd_infer.errors import TaskError
from spmd_infer.functional import ModelFunction, Params, model_function
from spmd_infer.memory import MemoryUse, memory_use
from spmd_infer.model_program import model_program
from spmd_infer.opening import OpenedModel, open_model
from spmd_infer.pipeline import base_axes, own_layouts, resolve_stages, stacked, unstacked
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.resolve import MeshLike, platform_of
from spmd_infer.planning.workload import Workload
from spmd_infer.programs import Program, Programs
from spmd_infer.runner import BatchRunner
from spmd_infer.signature import Signature
from spmd_infer.task_table import find_task
from spmd_infer.tensors import Axes

if TYPE_CHECKING:
    from spmd_infer.checkpoints import Reader
    from spmd_infer.models.registry import Family, ModelConfig


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
        function = model if isinstance(model, ModelFunction) else model_function(model, params, call_kwargs=call_kwargs)
        signature = Signature(inputs) if inputs is not None else None
        if example is not None and signature is None:
            signature = Signature.from_example(example)
        values = function.params
        function, plan, built = resolve_stages(mesh, function, signature.inputs if signature else None, workload, rules)
        placed = own_layouts(function, plan.weights, built)
        weights = stacked(
            function, plan.weights, built, {p: jax.device_put(values[p], to.sharding) for p, to in placed.items()}
        )
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
        self.data_parts = plan.rules.row_parts(dict(mesh.shape))
        self.buckets = Buckets.of(buckets, self.data_parts) if buckets else Buckets.default(self.data_parts)
        self.family: Family | None = opened.family if opened else None
        self.config: ModelConfig | None = opened.config if opened else None
        self.reader: Reader | None = opened.reader if opened else None
        self._model = function
        self._programs = Programs(mesh, plan.rules)
        self._runner = BatchRunner(self._programs, function, weights, signature, self.buckets)
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
        verify: Literal["full", "fast"] = "full",
    ) -> Engine:
        """Read a checkpoint of a zoo model straight onto a mesh.

        Args:
            path: a Hugging Face or native folder, a ``.safetensors``, ``.gguf`` or ``.pth`` file, or the name of a packaged demo
                such as ``demo:smollm2``.
            mesh: as for ``Engine``.
            dtype: load floating-point weights in this dtype; default as stored, quantised ones in float32 on CPU and
                bfloat16 elsewhere.
            workload: as for ``Engine``.
            buckets: as for ``Engine``.
            rules: as for ``Engine``.
            verify: for native checkpoints, which carry digests: ``"full"`` compares all that is read with them,
                ``"fast"`` only sizes and a sample.

        Raises:
            CheckpointError: the checkpoint is damaged or incomplete.
            ModelError: no model family answers to it.
            DoesNotFitError: the devices have too little memory; nothing has been read then.
        """
        from spmd_infer.checkpoints import load_onto

        opened = open_model(path, dtype, platform=platform_of(mesh), verify=verify)
        units = (rules or AxisRules()).with_units(opened.config.axis_units())
        traffic = opened.workload(workload or Workload())
        function, plan, built = resolve_stages(mesh, opened.model, opened.inputs, traffic, units)
        abstract = own_layouts(function, plan.weights, built)
        loaded = load_onto(opened.reader, {path: opened.table[path] for path in abstract}, abstract)
        weights = stacked(function, plan.weights, built, loaded)
        engine = cls.__new__(cls)
        engine._set_up(function, weights, plan, built, Signature(opened.inputs), buckets, opened)
        return engine

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Save the weights as a native checkpoint, which ``Engine.load`` reads onto any mesh.

        In a job of several processes all of them call this; each writes what its own devices hold.

        Raises:
            CheckpointError: the path exists and may not be overwritten, another process saves there, or it cannot be
                written. What was there before is then as it was.
        """
        from spmd_infer.checkpoints import save
        from spmd_infer.conversion import entry_of

        model = entry_of(self.family, self.config, self.reader) if self.family and self.config else None
        own = unstacked(self._model, self.params)
        save(own, path, axes=base_axes(self._model), model=model, source=self.reader, overwrite=overwrite)

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
        return next(self._runner.run((batch,), aggregate))

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
        return self._runner.run(batches, aggregate)

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
        return model_program(self._programs, self._model, self.params, name, fn, donate, out_axes)

    def place(self, array: Any, axes: Axes) -> jax.Array:
        """Put an array on the mesh by its logical axes; a ``jax.ShapeDtypeStruct`` is made of zeros on the devices."""
        sharding = NamedSharding(
            self.mesh, self.rules.of_activations.resolve(axes, array.shape, dict(self.mesh.shape)).spec
        )
        if isinstance(array, jax.ShapeDtypeStruct):
            return jnp.zeros(array.shape, array.dtype, device=sharding)
        placed: jax.Array = jax.device_put(array, sharding)
        return placed

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
                what = (
                    f"{self.family.name} models offer {self.family.task!r}"
                    if self.family
                    else "this is a model of your own"
                )
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
