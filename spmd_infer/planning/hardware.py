"""What a device can do: peak rates, memory and links, from ``hardware.toml``."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd_infer.errors import PlanError

if TYPE_CHECKING:
    import jax


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: its key in the table.
        flops: peak FLOP/s (or OP/s) by dtype name: ``float32``, ``bfloat16``, ``float8``, ``int8``.
        memory_bytes: its memory.
        bandwidth: memory bandwidth in bytes/s.
        link: bandwidth to devices of the same host, bytes/s and direction.
        network: bandwidth to devices of other hosts, bytes/s.
        latency: start-up time of one collective, s.
        hop: what each device that takes part adds to it, s.
        shared: whether all devices of a host are simulated on one machine and share all of the above.
    """

    name: str
    flops: dict[str, float]
    memory_bytes: int
    bandwidth: float
    link: float
    network: float
    latency: float
    hop: float
    shared: bool

    def peak(self, dtype: Any) -> float:
        """Peak rate of matrix products whose inputs have this dtype."""
        dtype = np.dtype(dtype)
        if dtype.itemsize == 1:
            wide = self.flops["int8" if dtype.kind in "iu" else "float8"]
            return wide or self.flops["bfloat16"]
        return self.flops["bfloat16" if dtype.itemsize == 2 else "float32"]


@dataclass(frozen=True)
class Cluster:
    """The devices to plan for.

    Attributes:
        device: what each of them is.
        count: how many there are.
        hosts: how many hosts they are spread over, evenly.
    """

    device: Device
    count: int
    hosts: int = 1

    @property
    def per_host(self) -> int:
        """Devices in one host."""
        return self.count // self.hosts

    def __str__(self) -> str:
        where = "" if self.hosts == 1 else f" on {self.hosts} hosts"
        simulated = "simulated " if self.device.shared and self.count > 1 else ""
        return f"{self.count} {simulated}{self.device.name} device{'s' * (self.count > 1)}{where}"


@cache
def hardware_table() -> dict[str, tuple[Device, tuple[str, ...]]]:
    """Every known device with the names by which drivers report it."""
    rows = tomllib.loads(files("spmd_infer.planning").joinpath("hardware.toml").read_text("utf-8"))
    return {name: (_device(name, row), tuple(row["match"])) for name, row in rows.items()}


def _device(name: str, row: dict[str, Any]) -> Device:
    return Device(
        name=name,
        flops={
            "float32": row["f32"] * 1e12,
            "bfloat16": row["bf16"] * 1e12,
            "float8": row["fp8"] * 1e12,
            "int8": row["int8"] * 1e12,
        },
        memory_bytes=int(row["memory_gb"] * 1e9),
        bandwidth=row["memory_tb_s"] * 1e12,
        link=row["links_gb_s"] * 1e9,
        network=row["network_gb_s"] * 1e9,
        latency=row["latency_us"] * 1e-6,
        hop=row["hop_us"] * 1e-6,
        shared=bool(row.get("shared", False)),
    )


def parse_cluster(text: str, hosts: int = 1) -> Cluster:
    """Read ``"16xH100"`` or ``"8"`` (simulated CPU devices).

    Raises:
        PlanError: the device is not in the table, or the hosts do not divide the devices.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:x\s*(\S.*?))?\s*", text)
    name = (match.group(2) or "cpu").lower() if match else ""
    if match is None or name not in hardware_table() or int(match.group(1)) < 1:
        raise PlanError(
            f"cannot read devices {text!r}: expected a number, or NUMBERxDEVICE with one of "
            f"{', '.join(hardware_table())}"
        )
    return _cluster(hardware_table()[name][0], int(match.group(1)), hosts)


def found_cluster(devices: Sequence[jax.Device]) -> Cluster:
    """The cluster that these devices form, with the memory that they report."""
    first = devices[0]
    hosts = len({device.process_index for device in devices})
    kind = "cpu" if first.platform == "cpu" else first.device_kind
    device = next(
        (device for device, names in hardware_table().values() if any(name.lower() in kind.lower() for name in names)),
        None,
    )
    if device is None:
        raise PlanError(f"no figures for a {kind!r} device; known are {', '.join(hardware_table())}")
    if device.shared:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        device = replace(device, memory_bytes=memory)
    else:
        stats = first.memory_stats() or {}
        device = replace(device, memory_bytes=int(stats.get("bytes_limit", device.memory_bytes)))
    return _cluster(device, len(devices), hosts)


def _cluster(device: Device, count: int, hosts: int) -> Cluster:
    if hosts < 1 or count % hosts:
        raise PlanError(f"{count} devices cannot be spread evenly over {hosts} hosts")
    if device.shared:
        device = replace(device, memory_bytes=device.memory_bytes // count)
    return Cluster(device, count, hosts)
