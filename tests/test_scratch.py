"""Memory that malloc keeps: the pages that a call touches for the first time."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, resource
import numpy as np
from flax import nnx
from spmd_infer.engine import Engine
from spmd_infer.models.cnn import Config, SmallCNN, input_spec
from spmd_infer.scratch import keep_scratch

config = Config()
engine = Engine(SmallCNN(config, rngs=nnx.Rngs(0)), mesh="data=1", inputs=input_spec(config), buckets=[64])
batch = {"image": np.zeros((64, 32, 32, 1), np.float32)}
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    engine.infer(batch)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps({"faults": faults[2:], "kept": keep_scratch()}))
"""


def run(**settings: str) -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | settings
    answer = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, env=environment, check=True
    )
    return json.loads(answer.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="of the GNU C library")
def test_scratch_memory_is_not_cleared_again_in_every_call() -> None:
    found = run()
    if not found["kept"]:
        pytest.skip("another C library")
    # One intermediate result of 64 images is 16.8 MB, 4096 pages.
    assert sorted(found["faults"])[1] < 1000  # type: ignore[index]  # a list of numbers


def test_what_the_user_has_set_stays() -> None:
    assert run(MALLOC_TRIM_THRESHOLD_="131072")["kept"] is False
