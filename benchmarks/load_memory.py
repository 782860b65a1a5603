"""How much host memory loading takes beyond the arrays themselves.

    python benchmarks/load_memory.py [--devices 8] [--mesh data=2,model=4] [--json FILE] [CHECKPOINT ...]

Each checkpoint (default: the packaged SmolLM2, MiniLM and EfficientNet-Lite0) is loaded in a process of its own, tensor
by tensor as stored, every weight split where a dimension divides over the mesh's model axis and replicated where none
does. "beyond" is the process's peak resident memory minus what it held before loading and minus the arrays' bytes. On
simulated devices the replicas of one slice share its memory, so each distinct slice counts once; the bytes that devices
with memory of their own would hold are shown as "on devices". "largest" is the largest tensor as loaded, "engine" the
same figure for ``Engine.load`` (the model's name table and plan: transforms of whole tensors included).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

DEMOS = ("demo:smollm2", "demo:minilm", "demo:efficientnet-lite0")
MIB = 1 << 20


def resident() -> int:
    """The process's resident memory now, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) * 1024


class Peak:
    """The most resident memory while in the block, by the kernel's own high-water mark."""

    def __enter__(self) -> Peak:
        self.before = resident()
        try:
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self._sampler = None
        except OSError:
            self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._most, self._ended = self.before, threading.Event()
        if self._sampler is not None:
            self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._ended.wait(0.001):
            self._most = max(self._most, resident())

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._sampler is None:
            status = Path("/proc/self/status").read_text()
            self._most = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024
        self.most = self._most


def measure(checkpoint: str, mesh_text: str, *, through_engine: bool) -> dict[str, Any]:
    """Load one checkpoint in this process."""
    import jax
    import numpy as np

    from spmd_infer import Engine
    from spmd_infer.checkpoints import load_onto, open_checkpoint
    from spmd_infer.demo import demo_path
    from spmd_infer.mesh import MeshSpec
    from spmd_infer.tensors import Source

    path = demo_path(checkpoint) if checkpoint.startswith("demo:") else Path(checkpoint)
    reader = open_checkpoint(path)
    mesh = MeshSpec.parse(mesh_text).build()
    for device in jax.devices():  # start the devices first
        jax.device_put(np.ones(1 << 10, np.float32), device).block_until_ready()
    started = time.perf_counter()
    if through_engine:
        with Peak() as peak:
            engine = Engine.load(path, mesh=mesh)
            jax.block_until_ready(engine.params)
        arrays = jax.tree.leaves(engine.params)
    else:
        parts = mesh.shape.get("model", 1)
        abstract = {}
        for name, info in reader.tensors.items():
            split = next((d for d, size in enumerate(info.shape) if size % parts == 0), None)
            spec = ["model" if d == split else None for d in range(len(info.shape))]
            sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
            dtype = jax.dtypes.canonicalize_dtype(info.dtype)
            abstract[name] = jax.ShapeDtypeStruct(info.shape, dtype, sharding=sharding)
        with Peak() as peak:
            loaded = load_onto(reader, {name: Source(name) for name in abstract}, abstract)
            jax.block_until_ready(loaded)
        arrays = list(loaded.values())
    seconds = time.perf_counter() - started
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes for array in arrays for shard in array.addressable_shards
    }
    held = sum(buffers.values())
    return {
        "checkpoint": checkpoint,
        "mesh": mesh_text,
        "through": "engine" if through_engine else "load_onto",
        "file_bytes": sum(info.nbytes for info in reader.tensors.values()),
        "array_bytes": held,
        "on_devices_bytes": sum(shard.data.nbytes for a in arrays for shard in a.addressable_shards),
        "largest_tensor_bytes": max(array.nbytes for array in arrays),
        "grown_bytes": peak.most - peak.before,
        "beyond_bytes": peak.most - peak.before - held,
        "seconds": seconds,
        "peak_process_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def measure_apart(checkpoint: str, mesh: str, devices: int, *, through_engine: bool) -> dict[str, Any]:
    """Load one checkpoint in a fresh process with simulated devices."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
    }
    command = [sys.executable, __file__, "--one", checkpoint, "--mesh", mesh]
    if through_engine:
        command.append("--engine")
    ended = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if ended.returncode:
        sys.exit(f"measuring {checkpoint} failed; see above")
    result: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=list(DEMOS), help="files, folders or demo names")
    parser.add_argument("--devices", type=int, default=8, help="simulated devices")
    parser.add_argument("--mesh", default="data=2,model=4")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--engine", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.mesh, through_engine=options.engine)))
        return
    rows = [
        measure_apart(checkpoint, options.mesh, options.devices, through_engine=through_engine)
        for checkpoint in options.checkpoints
        for through_engine in (False, True)
    ]
    columns = ("checkpoint", "through", "in file", "arrays", "on devices", "largest", "grown", "beyond", "seconds")
    print(f"MiB, mesh {options.mesh} on {options.devices} simulated CPU devices")
    print(f"{columns[0]:<26}{columns[1]:<11}" + "".join(f"{name:>12}" for name in columns[2:]))
    for row in rows:
        sizes = ("file", "array", "on_devices", "largest_tensor", "grown", "beyond")
        figures = "".join(f"{row[f'{name}_bytes'] / MIB:>12.1f}" for name in sizes)
        print(f"{row['checkpoint']:<26}{row['through']:<11}{figures}{row['seconds']:>12.2f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
