"""What the devices hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spmd_infer.programs import Program


@dataclass(frozen=True)
class MemoryUse:
    """Bytes on the devices of an engine.

    Attributes:
        weights: bytes of weights by device, such as ``{"cpu:0": 67_000_000}``.
        temporaries: scratch memory per device of the hungriest program compiled so far.
        limits: what each device has, where its backend says.
    """

    weights: Mapping[str, int]
    temporaries: int
    limits: Mapping[str, int]

    @property
    def fullest(self) -> int:
        """Bytes on the fullest device."""
        return max(self.weights.values()) + self.temporaries


def memory_use(params: Mapping[str, Any], programs: Sequence[Program]) -> MemoryUse:
    """Add up the shards of all weights by device."""
    weights: dict[str, int] = {}
    limits: dict[str, int] = {}
    for value in params.values():
        for shard in value.addressable_shards:
            name = f"{shard.device.platform}:{shard.device.id}"
            weights[name] = weights.get(name, 0) + shard.data.nbytes
            if name not in limits:
                limits[name] = int((shard.device.memory_stats() or {}).get("bytes_limit", 0))
    return MemoryUse(
        weights,
        max((program.temporary_bytes for program in programs), default=0),
        {name: limit for name, limit in limits.items() if limit},
    )
