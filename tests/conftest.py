"""What every test shares: eight simulated devices, the demo weights, and the meshes to try."""

import gc
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import _lru_cache_wrapper
from pathlib import Path

# The one place that says on what the tests run; it must come before JAX is imported.
SIMULATED_DEVICES = 8
if "jax" in sys.modules:
    raise RuntimeError("JAX was imported before tests/conftest.py could set the simulated devices")
_platform = os.environ.get("SPMD_INFER_TEST_PLATFORM", "cpu")
os.environ["JAX_PLATFORMS"] = _platform
if _platform == "cpu":
    _flags = [f for f in os.environ.get("XLA_FLAGS", "").split() if "host_platform_device_count" not in f]
    os.environ["XLA_FLAGS"] = " ".join([*_flags, f"--xla_force_host_platform_device_count={SIMULATED_DEVICES}"])

# A developer's own hardware table must not change what plans come to.
os.environ["SPMD_INFER_HARDWARE"] = os.devnull

import jax
import pytest

from spmd_infer import demo
from spmd_infer.errors import SpmdInferError

# (data, model) sizes on which sharded must equal unsharded.
MESHES = ((1, 1), (8, 1), (1, 8), (2, 4), (4, 2))
LONGEST = (
    "faults/test_jobs.py",
    "tasks/test_generate_together.py",
    "tasks/test_generate.py",
    "tasks/test_quantised.py",
)
"""Files of tests that take minutes, the longest first."""
MOST_MAPPINGS = 12_000
"""Memory mappings that a process of the tests may begin a module with."""


def pytest_configure(config: pytest.Config) -> None:
    """What one test has compiled, the others of this process find: most tests compile the same small models."""
    folder = tempfile.TemporaryDirectory(prefix="spmd-infer-tests-compiled-")
    config.add_cleanup(folder.cleanup)
    jax.config.update("jax_compilation_cache_dir", folder.name)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first: two workers share files out, and one would wait for the other in the end."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.relative_to(Path(__file__).parent).as_posix(), len(LONGEST)))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that takes ``mesh_text`` runs on every mesh, given as ``"data=2,model=4"``."""
    if "mesh_text" in metafunc.fixturenames:
        metafunc.parametrize(
            "mesh_text",
            [f"data={data},model={model}" for data, model in MESHES],
            ids=[f"{data}x{model}" for data, model in MESHES],
        )


@pytest.fixture(scope="module", autouse=True)
def _few_mappings() -> Iterator[None]:
    """After a module, let go of engines and programs where they have become many.

    Each program on CPU takes some ten memory mappings, of which Linux gives a process 65,530; the compilation that
    needs one more ends it with a segmentation fault.
    """
    yield
    mappings = Path("/proc/self/maps")
    if not mappings.exists() or mappings.read_bytes().count(b"\n") <= MOST_MAPPINGS:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # temporary folders that a cached function kept go with it
        for name in [name for name in sys.modules if name.startswith("tests.")]:
            for value in vars(sys.modules[name]).values():
                if isinstance(value, _lru_cache_wrapper):
                    value.cache_clear()
        jax.clear_caches()
        gc.collect()


def _demo(name: str) -> Path:
    try:
        return demo.demo_path(name)
    except SpmdInferError as error:
        if os.environ.get("CI", "").lower() not in ("", "0", "false"):
            pytest.fail(f"CI must have the demo wheels: {error}", pytrace=False)
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct."""
    return _demo("demo:smollm2")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2."""
    return _demo("demo:minilm")


@pytest.fixture(scope="session")
def efficientnet() -> Path:
    """The state dict of EfficientNet-Lite0."""
    return _demo("demo:efficientnet-lite0")


@pytest.fixture(scope="session")
def imagenet_pictures() -> list[tuple[Path, int]]:
    """Twenty ImageNet pictures, each with its class index."""
    return demo.imagenet_pictures(_demo("demo:imagenet"))


@pytest.fixture(scope="session")
def sts_b_test() -> list[tuple[float, str, str]]:
    """The 1,379 rows of the STS-B test set: score from 0 to 5, two sentences."""
    return demo.sts_b_rows(_demo("demo:sts-b"))


@pytest.fixture(scope="session")
def human_eval() -> list[str]:
    """The 164 prompts of HumanEval."""
    return demo.human_eval_prompts(_demo("demo:human-eval"))


@pytest.fixture(scope="session")
def whisper_tiny() -> Path:
    """The folder of Whisper tiny.en, as CTranslate2 stores it."""
    return _demo("demo:whisper-tiny.en")
