"""Which devices the driver lists and which JAX sees, for ``doctor``."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: its name.
        found: what was found, in words.
        level: ``ok``, ``hint`` (works, but could be better or is unusual) or ``problem`` (something will not work).
        advice: what to do about it; empty where nothing is to be done.
    """

    what: str
    found: str
    level: Literal["ok", "hint", "problem"] = "ok"
    advice: str = ""


def visible_gpus() -> list[str]:
    """The NVIDIA GPUs that the driver lists: name and driver version of each."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]


def jax_devices(timeout: float) -> dict[str, Any]:
    """What JAX sees, asked in a process of its own: a broken driver may hang or kill it.

    Returns:
        ``{"devices": [{"platform", "kind", "memory"}]}``, or ``{"error": message}``.
    """
    program = (
        "import jax, json\n"
        "rows = [{'platform': d.platform, 'kind': d.device_kind,"
        " 'memory': (d.memory_stats() or {}).get('bytes_limit')} for d in jax.devices()]\n"
        "print(json.dumps(rows))"
    )
    try:
        answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"error": f"JAX did not start within {timeout:g} s"}
    if answer.returncode != 0:
        last = [line for line in answer.stderr.splitlines() if line.strip()][-1:]
        return {"error": last[0] if last else f"JAX ended with code {answer.returncode}"}
    return {"devices": json.loads(answer.stdout.splitlines()[-1])}


def check_devices(seen: dict[str, Any], gpus: list[str]) -> Iterator[Finding]:
    """JAX's devices against the GPUs that the driver lists."""
    for gpu in gpus:
        yield Finding("gpu", gpu)
    if "error" in seen:
        yield Finding(
            "devices", seen["error"], "problem", "run python -c 'import jax; jax.devices()' for the whole story"
        )
        return
    kinds: dict[tuple[str, str, int | None], int] = {}
    for device in seen["devices"]:
        key = (device["platform"], device["kind"], device["memory"])
        kinds[key] = kinds.get(key, 0) + 1
    for (kind_platform, kind, memory), count in kinds.items():
        size = f", {memory / 2**30:.1f} GiB each" if memory else ""
        yield Finding("devices", f"{count} {kind_platform} ({kind}{size})")
    on_cpu = all(device["platform"] == "cpu" for device in seen["devices"])
    if gpus and on_cpu and os.environ.get("JAX_PLATFORMS") == "cpu":
        yield Finding("devices", "JAX_PLATFORMS=cpu hides the GPUs", "hint", "unset JAX_PLATFORMS to use them")
    elif gpus and on_cpu:
        advice = "pip install 'spmd-infer[cuda13]' (driver 580 or later) or 'spmd-infer[cuda12]' (525 or later)"
        yield Finding("devices", "there are GPUs, but JAX sees none", "problem", advice)
