"""Commands run in processes of their own; they share a compile cache that nothing else uses."""

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("xla")
    folder.chmod(0o700)
    before = os.environ.get("SPMD_INFER_COMPILE_CACHE")
    os.environ["SPMD_INFER_COMPILE_CACHE"] = str(folder)
    yield
    if before is None:
        del os.environ["SPMD_INFER_COMPILE_CACHE"]
    else:
        os.environ["SPMD_INFER_COMPILE_CACHE"] = before
