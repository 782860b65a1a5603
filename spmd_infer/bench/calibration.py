"""Measurements as an entry of the user's hardware table; simulated devices are measured in processes of their own."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spmd_infer.bench.collectives import Links, Reading, fit
from spmd_infer.bench.device import DeviceFigures
from spmd_infer.errors import SpmdInferError
from spmd_infer.planning.hardware import cores, entry_of
from spmd_infer.planning.hardware_file import Row, read_rows, read_user_rows, user_file, write_user_row

SIMULATED = (1, 2, 4, 8)
"""Numbers of simulated devices that a CPU is measured with."""

TIMEOUT = 120.0

_PROGRAM = """
import json
from spmd_infer.bench.{module} import {function}
found = {function}({seconds})
print(json.dumps([x.as_dict() for x in found] if isinstance(found, list) else found.as_dict()))
"""


def simulated_device(count: int, seconds: float = 0.4) -> DeviceFigures:
    """``measure_device`` with ``count`` simulated devices.

    Raises:
        SpmdInferError: the process failed or hung.
    """
    return DeviceFigures(**_in_process(count, "device", "measure_device", seconds))


def simulated_collectives(count: int, seconds: float = 0.1) -> list[Reading]:
    """``measure_collectives`` among ``count`` simulated devices.

    Raises:
        SpmdInferError: the process failed or hung.
    """
    found = _in_process(count, "collectives", "measure_collectives", seconds)
    return [Reading(row["kind"], row["group"], row["size"], row["seconds"]) for row in found]


def save_device(figures: Sequence[DeviceFigures]) -> tuple[str, Path]:
    """Write what was measured, one entry with rates for each number of simulated devices.

    Returns:
        The entry's name, and the file.
    """
    first = figures[0]
    name = _entry_name(first.platform, first.kind)
    if first.platform == "cpu":
        at = {str(figure.count): _rates(figure, figure.read) for figure in figures}
        return name, _save(name, first.platform, first.kind, {}, at)
    row = {key: value / first.count for key, value in _rates(first, first.copy).items()}
    row |= {"matmul_efficiency": 1.0, "memory_efficiency": 1.0}
    if first.memory_bytes:
        row["memory_gb"] = first.memory_bytes / 1e9
    return name, _save(name, first.platform, first.kind, row, {})


def save_links(platform: str, kind: str, readings: Mapping[int, Sequence[Reading]]) -> tuple[str, Path]:
    """Write the links that readings amount to, by number of devices; of accelerators those of all devices.

    Returns:
        The entry's name, and the file.
    """
    name = _entry_name(platform, kind)
    rows = {count: _links(fit(found)) for count, found in readings.items()}
    if platform == "cpu":
        plain = {str(count): {k: v for k, v in row.items() if k in _SIMULATED_LINKS} for count, row in rows.items()}
        return name, _save(name, platform, kind, {}, plain)
    return name, _save(name, platform, kind, rows[max(rows)] | {"link_efficiency": 1.0}, {})


_SIMULATED_LINKS = ("links_gb_s", "latency_us", "hop_us")


def _rates(figures: DeviceFigures, bandwidth: float) -> dict[str, float]:
    columns = {"float32": "f32", "bfloat16": "bf16", "int8": "int8"}
    row = {columns[k]: v / 1e12 for k, v in figures.flops.items()} | {"memory_tb_s": bandwidth / 1e12}
    return row | (
        {"expert_efficiency": min(1.0, figures.experts / figures.flops["float32"])} if figures.experts else {}
    )


def _links(links: Links) -> dict[str, float]:
    return {
        "links_gb_s": links.link / 1e9,
        "latency_us": links.latency * 1e6,
        "hop_us": links.hop * 1e6,
        "half_size_mb": links.half_size / 1e6,
    }


def _entry_name(platform: str, kind: str) -> str:
    if platform == "cpu":
        return f"cpu-{cores()}"
    return entry_of(kind, read_rows()) or re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-")


def _save(name: str, platform: str, kind: str, row: Row, at: Mapping[str, Row]) -> Path:
    """Put new figures over those that the user's entry has already."""
    path = user_file()
    old = read_user_rows(path).get(name, {}) if path.exists() else {}
    if not old and platform == "cpu":
        old = {"like": "cpu", "cores": cores(), "shared": True}
    elif not old and name not in read_rows():
        # Nothing is known of its links until they are measured: PCIe is the careful assumption.
        old = {"like": "l4", "match": [kind]}
    merged_at = dict(old.get("at", {}))
    for count, rates in at.items():
        merged_at[count] = merged_at.get(count, {}) | dict(rates)
    new = {k: v for k, v in old.items() if k != "at"} | row
    new["source"] = f"measured on {dt.datetime.now(dt.UTC):%Y-%m-%d} with spmd-infer bench"
    if merged_at:
        new["at"] = {count: merged_at[count] for count in sorted(merged_at, key=int)}
    return write_user_row(name, new)


def _in_process(count: int, module: str, function: str, seconds: float) -> Any:
    flags = [flag for flag in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in flag]
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_TRACEBACK_FILTERING": "off",  # a failure's last line is then its message
        "XLA_FLAGS": " ".join([*flags, f"--xla_force_host_platform_device_count={count}"]),
    }
    program = _PROGRAM.format(module=module, function=function, seconds=seconds)
    try:
        answer = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT, env=environment
        )
    except subprocess.TimeoutExpired as error:
        raise SpmdInferError(f"measuring {count} simulated devices took longer than {TIMEOUT:g} s") from error
    if answer.returncode != 0:
        last = [line for line in answer.stderr.splitlines() if line.strip()][-1:]
        raise SpmdInferError(f"measuring {count} simulated devices failed: {' '.join(last) or answer.returncode}")
    return json.loads(answer.stdout.splitlines()[-1])
