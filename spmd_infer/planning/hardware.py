"""What devices can do: peak and achievable rates, memory and links, and clusters of them.

The figures are rows of ``hardware.toml`` and of the user's own table (``hardware_file``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import TYPE_CHECKING, Any

import numpy as np

from spmd_infer.errors import PlanError
from spmd_infer.mesh import host_of
from spmd_infer.planning.hardware_file import Row, read_rows

if TYPE_CHECKING:
    import jax

CPU = "cpu"


@dataclass(frozen=True)
class Rates:
    """What all simulated devices of a machine reach together when a number of them run at once.

    Attributes:
        flops: FLOP/s by dtype name, as in ``Device``.
        bandwidth: memory bandwidth in bytes/s.
        link: bytes/s that one device sends while all groups of a collective talk at once.
        latency: start-up time of a collective, s.
        hop: what each device that takes part adds to it, s.
        expert_efficiency: as in ``Device``.
    """

    flops: Mapping[str, float]
    bandwidth: float
    link: float
    latency: float
    hop: float
    expert_efficiency: float = 1.0


@dataclass(frozen=True)
class Device:
    """One kind of device.

    Attributes:
        name: its key in the table.
        flops: peak FLOP/s (or OP/s) by dtype name: ``float32``, ``bfloat16``, ``float8``, ``int8``.
        memory_bytes: its memory.
        bandwidth: peak memory bandwidth in bytes/s.
        link: peak bandwidth to devices of the same link domain, bytes/s and direction.
        network: peak bandwidth to devices of other domains, bytes/s.
        latency: start-up time of one collective, s.
        hop: what each device that takes part adds to it, s.
        shared: whether all devices of a host are simulated on one machine and share all of the above.
        matmul_efficiency: the part of ``flops`` that large matrix products reach.
        expert_efficiency: the part of what large products reach that those within blocks of experts do. On a CPU that
            is what brings their rows together too.
        bandwidth_efficiency: the part of ``bandwidth`` that large reads reach.
        link_efficiency: the part of ``link`` and ``network`` that large collectives reach.
        half_size_bytes: a collective of this size reaches half of that.
        network_latency: start-up time of a collective that leaves its link domain, s.
        network_hop: what each host that takes part in such a one adds to it, s.
        per_host: devices in a host where the user does not say; 0 for any number.
        domain: devices joined by links; 0 where links end at the host.
        cores: CPU cores that the figures hold for; 0 for any.
        simulated: measured rates of a machine by the number of simulated devices that run at once.
        source: where the figures come from.
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
    matmul_efficiency: float = 1.0
    expert_efficiency: float = 1.0
    bandwidth_efficiency: float = 1.0
    link_efficiency: float = 1.0
    half_size_bytes: float = 0.0
    network_latency: float = 2e-5
    network_hop: float = 4e-6
    per_host: int = 0
    domain: int = 0
    cores: int = 0
    simulated: Mapping[int, Rates] = field(default_factory=dict)
    source: str = ""

    def peak(self, dtype: Any) -> float:
        """Peak rate of matrix products whose inputs have this dtype."""
        dtype = np.dtype(dtype)
        if dtype.itemsize == 1:
            wide = self.flops["int8" if dtype.kind in "iu" else "float8"]
            return wide or self.flops["bfloat16"]
        return self.flops["bfloat16" if dtype.itemsize == 2 else "float32"]

    def collective_bandwidth(self, size: float, *, leaves_domain: bool = False) -> float:
        """Bytes/s and direction at which a ring collective moves a result of ``size`` bytes.

        Large ones reach ``link * link_efficiency``; one of ``half_size_bytes`` half of that, and smaller ones less:
        ``1 / (1 + sqrt(half_size_bytes / size))``. Beyond a link domain the network is the limit.
        """
        reached = self.link * self.link_efficiency
        if size > 0:
            reached /= 1 + sqrt(self.half_size_bytes / size)
        return min(reached, self.network * self.link_efficiency if leaves_domain else inf)

    def collective_latency(self, parts: int, hosts: int = 1) -> float:
        """Seconds that a collective among ``parts`` devices takes before its first byte counts.

        Args:
            parts: devices that take part.
            hosts: link domains that they are spread over.
        """
        if hosts <= 1:
            return self.latency + parts * self.hop
        return self.network_latency + hosts * self.network_hop + parts / hosts * self.hop

    def running(self, count: int) -> Device:
        """This device with the rates that were measured with ``count`` simulated ones running at once.

        Between measured numbers the nearest smaller one holds; devices that are not simulated stay as they are.
        """
        if not self.simulated:
            return self
        measured = max((n for n in self.simulated if n <= count), default=min(self.simulated))
        rates = self.simulated[measured]
        return replace(
            self,
            flops=dict(rates.flops),
            bandwidth=rates.bandwidth,
            link=rates.link,
            latency=rates.latency,
            hop=rates.hop,
            expert_efficiency=rates.expert_efficiency,
        )


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

    @property
    def domain(self) -> int:
        """How many consecutive devices are joined by links: a host's, or those of a larger link domain."""
        return min(self.count, max(self.per_host, self.device.domain))

    def __str__(self) -> str:
        where = "" if self.hosts == 1 else f" on {self.hosts} hosts"
        simulated = "simulated " if self.device.shared and self.count > 1 else ""
        return f"{self.count} {simulated}{self.device.name} device{'s' * (self.count > 1)}{where}"


def hardware_table() -> dict[str, tuple[Device, tuple[str, ...]]]:
    """Every known device with the names by which drivers report it.

    Raises:
        PlanError: the user's table is not what it should be.
    """
    return {name: (_device(name, row), tuple(row["match"])) for name, row in read_rows().items()}


def _device(name: str, row: Row) -> Device:
    return Device(
        name=name,
        flops=_flops(row),
        memory_bytes=int(row["memory_gb"] * 1e9),
        bandwidth=row["memory_tb_s"] * 1e12,
        link=row["links_gb_s"] * 1e9,
        network=row["network_gb_s"] * 1e9,
        latency=row["latency_us"] * 1e-6,
        hop=row["hop_us"] * 1e-6,
        shared=bool(row.get("shared", False)),
        matmul_efficiency=row["matmul_efficiency"],
        expert_efficiency=row["expert_efficiency"],
        bandwidth_efficiency=row["memory_efficiency"],
        link_efficiency=row["link_efficiency"],
        half_size_bytes=row["half_size_mb"] * 1e6,
        network_latency=row["network_latency_us"] * 1e-6,
        network_hop=row["network_hop_us"] * 1e-6,
        per_host=row["per_host"],
        domain=row["domain"],
        cores=row["cores"],
        simulated={int(count): _rates(row | rates) for count, rates in row.get("at", {}).items()},
        source=row.get("source", ""),
    )


def _rates(row: Row) -> Rates:
    latency, hop = row["latency_us"] * 1e-6, row["hop_us"] * 1e-6
    links = row["links_gb_s"] * 1e9
    return Rates(_flops(row), row["memory_tb_s"] * 1e12, links, latency, hop, row["expert_efficiency"])


def _flops(row: Mapping[str, Any]) -> dict[str, float]:
    columns = {"float32": "f32", "bfloat16": "bf16", "float8": "fp8", "int8": "int8"}
    return {dtype: row[column] * 1e12 for dtype, column in columns.items()}


def parse_cluster(text: str, hosts: int | None = None) -> Cluster:
    """Read ``"16xH100"`` or ``"8"`` (simulated CPU devices).

    Args:
        text: how many of which device, by its name in the table or an alias, in any case.
        hosts: how many hosts they are spread over; by default as few as the device's usual hosts allow.

    Raises:
        PlanError: the device is not in the table, or the hosts do not divide the devices.
    """
    match = re.fullmatch(r"\s*(\d+)\s*(?:x\s*(\S.*?))?\s*", text)
    rows = read_rows()
    name = None
    if match is not None and int(match.group(1)) >= 1:
        said = re.sub(r"[\s_]+", "-", (match.group(2) or CPU).lower())
        name = next((key for key, row in rows.items() if said == key or said in row.get("aliases", ())), None)
        if said == CPU:
            name = _this_machine(rows)
    if match is None or name is None:
        raise PlanError(
            f"cannot read devices {text!r}: expected a number, or NUMBERxDEVICE with one of {', '.join(rows)}"
        )
    device, count = _device(name, rows[name]), int(match.group(1))
    return _cluster(device, count, hosts if hosts is not None else _usual_hosts(device, count))


def found_cluster(devices: Sequence[jax.Device]) -> Cluster:
    """The cluster that these devices form, with the memory that they report.

    The figures are those of the entry whose name for the driver matches most of the device's kind; for a CPU an entry
    for this number of cores wins over the general one.

    Raises:
        PlanError: no entry matches.
    """
    first = devices[0]
    hosts = len({host_of(device) for device in devices})
    rows = read_rows()
    if first.platform == CPU:
        device = _device(_this_machine(rows), rows[_this_machine(rows)])
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return _cluster(replace(device, memory_bytes=memory), len(devices), hosts)
    name = entry_of(first.device_kind, rows)
    if name is None:
        raise PlanError(
            f"no figures for a {first.device_kind!r} device; known are {', '.join(rows)}. Measure this one with: "
            "spmd-infer bench device --save"
        )
    device = _device(name, rows[name])
    stats = first.memory_stats() or {}
    device = replace(device, memory_bytes=int(stats.get("bytes_limit", device.memory_bytes)))
    return _cluster(device, len(devices), hosts)


def entry_of(kind: str, rows: Mapping[str, Row]) -> str | None:
    """The entry for a device by the name that its driver reports; the longest match wins (GB200 is no B200)."""
    found = [(len(part), name) for name, row in rows.items() for part in row["match"] if part.lower() in kind.lower()]
    return max(found)[1] if found else None


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _this_machine(rows: Mapping[str, Row]) -> str:
    """The CPU entry for this number of cores, else the general one."""
    return next((name for name, row in rows.items() if row.get("shared") and row["cores"] == cores()), CPU)


def _usual_hosts(device: Device, count: int) -> int:
    """The fewest hosts of the usual size that hold the devices evenly."""
    if not device.per_host or count <= device.per_host:
        return 1
    least = -(-count // device.per_host)
    return next(hosts for hosts in range(least, count + 1) if count % hosts == 0)


def _cluster(device: Device, count: int, hosts: int) -> Cluster:
    if hosts < 1 or count % hosts:
        raise PlanError(f"{count} devices cannot be spread evenly over {hosts} hosts")
    if device.shared:
        device = replace(device.running(count), memory_bytes=device.memory_bytes // count)
    return Cluster(device, count, hosts)
