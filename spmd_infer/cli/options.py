"""Options that several verbs share, each with its environment variable, and loading an engine from them."""

from __future__ import annotations

import os
import sys
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spmd_infer.errors import MeshError

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

DEBUG_VARIABLE = "SPMD_INFER_DEBUG"


def _debug(wanted: bool) -> None:
    if wanted:
        os.environ[DEBUG_VARIABLE] = "1"


Model = Annotated[str, typer.Argument(help="Checkpoint, or demo:NAME.", show_default=False)]
Mesh = Annotated[
    str,
    typer.Option(
        help="How the devices are laid out, as in data=2,model=4; auto lets the planner choose.",
        envvar="SPMD_INFER_MESH",
    ),
]
Devices = Annotated[
    int | None,
    typer.Option(
        min=1,
        max=4096,
        help="Simulate this many devices on the CPU, instead of using the devices there are.",
        envvar="SPMD_INFER_DEVICES",
        show_default=False,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        help="Number format of the weights, as in float32 or bfloat16; chosen for the device where not given.",
        envvar="SPMD_INFER_DTYPE",
        show_default=False,
    ),
]

Quantize = Annotated[
    str | None,
    typer.Option(
        help="Hold weights of projections as int8, fp8, int4 or, with the size of groups, int4:32.",
        envvar="SPMD_INFER_QUANTIZE",
        show_default=False,
    ),
]

CacheDtype = Annotated[
    str,
    typer.Option(
        help="Hold keys and values as float32, bfloat16, int8 or fp8; auto takes what is fastest on the devices.",
        envvar="SPMD_INFER_CACHE_DTYPE",
    ),
]


class VerifyLevel(StrEnum):
    """How a native checkpoint is checked while it is read."""

    FULL = "full"
    FAST = "fast"
    OFF = "off"


Verify = Annotated[
    VerifyLevel,
    typer.Option(
        help="How native checkpoints are checked while they are read: every byte, sizes and a sample, or sizes alone.",
        envvar="SPMD_INFER_VERIFY",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Debug = Annotated[
    bool,
    typer.Option("--debug", help="Show the traceback of every error.", callback=_debug, envvar=DEBUG_VARIABLE),
]


def use_devices(count: int | None) -> None:
    """Make JAX simulate ``count`` devices on the CPU; must run before JAX starts.

    Raises:
        MeshError: JAX has started with other devices.
    """
    if count is None:
        return
    ask_for_devices(count)
    import jax

    found = jax.devices()
    if len(found) != count or found[0].platform != "cpu":
        raise MeshError(
            f"cannot simulate {count} devices: JAX runs already with {len(found)} {found[0].platform} devices in this "
            "process; run the command in a process of its own"
        )


def ask_for_devices(count: int) -> None:
    """Have JAX simulate ``count`` devices when it starts, in each process of a job."""
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={count}"])
    os.environ["JAX_PLATFORMS"] = "cpu"


def load(
    model: str,
    mesh: str,
    devices: int | None,
    dtype: str | None,
    *,
    verify: VerifyLevel = VerifyLevel.FULL,
    quantize: str | None = None,
    quiet: bool,
) -> Engine:
    """Load an engine and say on standard error, unless ``quiet``, what it is and how it lies on the devices.

    Raises:
        SpmdInferError: the checkpoint, mesh, dtype or format cannot be used.
    """
    begin = time.perf_counter()
    use_devices(devices)
    from spmd_infer.compile_cache import use_compile_cache
    from spmd_infer.engine import Engine

    use_compile_cache()
    engine = Engine.load(model, mesh=mesh, dtype=dtype, verify=verify.value, quantize=quantize)
    if not quiet:
        note(
            f"{model} on mesh {engine.plan.mesh} of {engine.plan.cluster}, {time.perf_counter() - begin:.1f} s to load"
        )
    return engine


def run_facts(engine: Engine, seconds: float) -> dict[str, Any]:
    """What every verb's JSON says of a run that took ``seconds``, compiling included."""
    return {
        "mesh": engine.plan.mesh.shape,
        "seconds": seconds,
        "compiles": engine.compiles,
        "compile_seconds": engine.compile_seconds,
    }


def timing(engine: Engine, seconds: float) -> str:
    """How long a run took, compiling apart."""
    compiling = min(engine.compile_seconds, seconds)
    return f"{seconds - compiling:.2f} s, and {compiling:.2f} s to compile {engine.compiles} programs"


def note(message: str) -> None:
    """Say something to the person, on standard error so that results can be piped."""
    print(message, file=sys.stderr, flush=True)


def print_json(document: Any) -> None:
    """Print a result for programs: one line of JSON."""
    import msgspec

    sys.stdout.write(msgspec.json.encode(document, enc_hook=_plain).decode() + "\n")


def _plain(value: Any) -> Any:
    """NumPy arrays and scalars as lists and numbers."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
