"""spmd-infer: run any JAX or Flax model sharded over a mesh of devices.

Names are imported when they are first used, so that ``import spmd_infer`` is cheap and does not start JAX.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from spmd_infer.aggregate import Aggregate, Concat, MajorityVote, Max, Mean, Min, WeightedMean
    from spmd_infer.axes import AxisRules, axis_scope, constrain
    from spmd_infer.engine import Engine
    from spmd_infer.errors import SpmdInferError
    from spmd_infer.generation.generation_options import GenerationOptions
    from spmd_infer.generation.sampling_params import SamplingParams
    from spmd_infer.generation.speculation import Draft, PromptLookup
    from spmd_infer.generation.structured_outputs import StructuredOutputs
    from spmd_infer.mesh import MeshSpec
    from spmd_infer.multihost.start import initialize
    from spmd_infer.planning.layouts import find_layout
    from spmd_infer.planning.mesh_plan import MeshPlan
    from spmd_infer.planning.workload import Workload
    from spmd_infer.plans import plan
    from spmd_infer.tasks.completions import Completion
    from spmd_infer.tensors import InputSpec

_HOME = {
    "Aggregate": "aggregate",
    "AxisRules": "axes",
    "Completion": "tasks.completions",
    "Concat": "aggregate",
    "Draft": "generation.speculation",
    "Engine": "engine",
    "GenerationOptions": "generation.generation_options",
    "InputSpec": "tensors",
    "MajorityVote": "aggregate",
    "Max": "aggregate",
    "Mean": "aggregate",
    "MeshPlan": "planning.mesh_plan",
    "MeshSpec": "mesh",
    "Min": "aggregate",
    "PromptLookup": "generation.speculation",
    "SamplingParams": "generation.sampling_params",
    "SpmdInferError": "errors",
    "StructuredOutputs": "generation.structured_outputs",
    "WeightedMean": "aggregate",
    "Workload": "planning.workload",
    "axis_scope": "axes",
    "constrain": "axes",
    "find_layout": "planning.layouts",
    "initialize": "multihost.start",
    "plan": "plans",
}

__all__ = [
    "Aggregate",
    "AxisRules",
    "Completion",
    "Concat",
    "Draft",
    "Engine",
    "GenerationOptions",
    "InputSpec",
    "MajorityVote",
    "Max",
    "Mean",
    "MeshPlan",
    "MeshSpec",
    "Min",
    "PromptLookup",
    "SamplingParams",
    "SpmdInferError",
    "StructuredOutputs",
    "WeightedMean",
    "Workload",
    "__version__",
    "axis_scope",
    "constrain",
    "find_layout",
    "initialize",
    "plan",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'spmd_infer' has no attribute {name!r}")
    value = getattr(import_module(f"spmd_infer.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
