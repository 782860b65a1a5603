"""``spmd_infer.plan``: plan any model for any devices, without them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from spmd_infer.axes import SEQ, AxisRules
from spmd_infer.errors import CheckpointError
from spmd_infer.functional import model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.models.quantised import FORMATS
from spmd_infer.opening import DescribedModel, describe_model, open_model
from spmd_infer.planning import known_models
from spmd_infer.planning.hardware import Cluster, found_cluster, parse_cluster
from spmd_infer.planning.mesh_plan import MeshPlan
from spmd_infer.planning.search import make_plan
from spmd_infer.planning.workload import DEFAULT_OUTPUT, DEFAULT_SIZE, Objective, Workload
from spmd_infer.signature import Signature


def plan(
    model: Any,
    params: Any = None,
    *,
    devices: str | int | Cluster | None = None,
    hosts: int | None = None,
    batch: int = 8,
    length: int | None = None,
    output: int | None = None,
    objective: Objective = "latency",
    ttft_limit: float | None = None,
    itl_limit: float | None = None,
    mesh: str | MeshSpec = "auto",
    dtype: Any = None,
    cache_dtype: str = "auto",
    example: Any = None,
    inputs: Any = None,
    rules: AxisRules | None = None,
) -> MeshPlan:
    """How a model would lie on devices, and why.

    Args:
        model: the name of a well-known model (``"llama-3.1-70b"``), the path of its ``config.json`` or of a checkpoint,
            or a model as ``Engine`` takes it; abstract parameters will do.
        params: parameters of a Linen module or function.
        devices: ``"16xH100"``, a number of simulated CPU devices, or a ``Cluster``; default the devices there are.
        hosts: how many hosts they are spread over; default as few as the device's usual hosts allow.
        batch: rows that one step handles.
        length: tokens in a row (of a prompt, for models that generate), for models of text; default 128.
        output: tokens that each request asks for, for models that generate; default 64.
        objective: ``latency``, ``throughput`` or ``cost``; see ``Workload``.
        ttft_limit: seconds to the first token that no plan may exceed.
        itl_limit: seconds between tokens that no plan may exceed.
        mesh: ``"auto"``, or a mesh to judge.
        dtype: as for ``Engine.load``; or ``int8``, ``fp8``, ``int4`` for quantised projections, as its ``quantize``.
        cache_dtype: what the cache holds, for models that generate: ``auto`` for the weights' floats, or as
            ``GenerationOptions`` takes it.
        example: a batch of a model of your own, from which its inputs are learnt.
        inputs: a pytree of ``InputSpec`` instead.
        rules: where logical axes go.

    Raises:
        PlanError: the devices are unknown, or no mesh works; ``DoesNotFitError`` where memory is what is missing.
    """
    cluster = _cluster(devices, hosts)
    workload = Workload(
        rows=batch,
        sizes={SEQ: length or DEFAULT_SIZE},
        output_len=output or DEFAULT_OUTPUT,
        objective=objective,
        ttft_limit=ttft_limit,
        itl_limit=itl_limit,
        cache_dtype=cache_dtype,
    )
    spec = None if mesh == "auto" else MeshSpec.parse(mesh) if isinstance(mesh, str) else mesh
    if isinstance(model, str | Path):
        known = _known(model)
        described = _described(model, known, dtype, cluster)
        workload = described.workload(workload)
        plan_ = make_plan(
            described.model,
            cluster,
            inputs=described.inputs,
            phases=described.phases(workload),
            workload=workload,
            rules=rules,
            mesh=spec,
            units=dict(described.config.axis_units()),
            shallow=described.shallow(workload),
        )
        notes = (*plan_.notes, *described.notes)
        if known is not None and "approximation" in known:
            notes += (f"approximation: {known['approximation']}",)
        return replace(plan_, notes=notes)
    function = model_function(model, params)
    if example is not None and inputs is None:
        inputs = Signature.from_example(example).inputs
    return make_plan(function, cluster, inputs=inputs, workload=workload, rules=rules, mesh=spec)


def describe(model: str | Path, dtype: Any, cluster: Cluster) -> DescribedModel:
    """The model that a name, a ``config.json`` or a checkpoint stands for.

    Raises:
        CheckpointError: there is no such file, and no well-known model of that name.
        ModelError: no family answers to it.
    """
    return _described(model, _known(model), dtype, cluster)


def _known(model: str | Path) -> dict[str, Any] | None:
    """The configuration of a well-known model; a file of that name comes first."""
    return None if Path(model).exists() else known_models.find(str(model))


def _described(model: str | Path, known: dict[str, Any] | None, dtype: Any, cluster: Cluster) -> DescribedModel:
    quantize = str(dtype) if str(dtype).partition(":")[0] in FORMATS else None
    dtype = None if quantize is not None else dtype
    if known is not None:
        return describe_model(known, dtype, quantize)
    if Path(model).name == "config.json" and Path(model).is_file():
        try:
            return describe_model(json.loads(Path(model).read_text("utf-8")), dtype, quantize)
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"{model} is not a model's configuration: {error}") from error
    platform = "cpu" if cluster.device.shared else cluster.device.name
    return open_model(model, dtype, platform=platform, quantize=quantize)


def _cluster(devices: str | int | Cluster | None, hosts: int | None) -> Cluster:
    if isinstance(devices, Cluster):
        return devices
    if devices is None:
        return found_cluster(jax.devices())
    return parse_cluster(str(devices), hosts)
