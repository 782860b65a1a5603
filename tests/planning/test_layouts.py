"""Every layout on every model that has it: one device's results, and the communication that the layout implies.

``python benchmarks/layouts.py`` prints the whole matrix, with more meshes; docs/layouts.md explains it.
"""

import numpy as np
import pytest

from benchmarks.layouts import LENGTH, MODELS, ROWS, Case, cases, measure, run
from spmd_infer.models import bert, llama

TESTED = {
    "1d": ("data=2,model=4", "data=2,seq=2,model=2"),
    "2d": ("data=2,model=4",),
    "gathered": ("data=2,model=4",),
    "kv-batch": ("data=2,model=4",),
    "ring": ("data=2,seq=2,model=2",),
    "rows": ("data=2,seq=2,model=2",),
    "columns": ("data=2,seq=2,model=2",),
    "blocks": ("data=2,seq=2,model=2",),
}
# Of the models that differ only in their heads and of the slow one, the cases that say something new.
ONLY = {
    "llama 8/1 heads": ("kv-batch", "ring"),
    "bert 3 heads": ("2d", "ring"),
    "efficientnet": ("1d", "gathered", "columns"),
}
CASES = [c for c in cases() if c.mesh in TESTED[c.layout] and c.layout in ONLY.get(c.model, TESTED)]

# float32 sums in another order; the largest that was measured is 2e-6.
TOLERANCE = 1e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_layout(case: Case) -> None:
    outcome = measure(case)
    assert outcome.error <= TOLERANCE
    for line in outcome.traffic:
        assert line.explained, line
    found = {(line.kind, line.axes): line for line in outcome.traffic if line.found}
    config = MODELS[case.model][1]
    if case.layout == "1d":
        # Nothing but sums over `model`, and over `seq` keys and values; an EfficientNet's averaged features.
        assert {kind for kind, _ in found} <= {"all-reduce", "all-gather"}
    if case.layout == "ring":
        permutes = found["collective-permute", ("seq",)]
        heads, width = _heads_on_a_device(config, 2), getattr(config, "head_dim", 16)
        assert permutes.found == _layers(config)  # two devices: one step
        assert permutes.found_bytes == _layers(config) * 2 * (ROWS // 2) * (LENGTH // 2) * heads * width * 4
        assert ("all-gather", ("seq",)) not in found
    if case.layout == "gathered" and case.model != "efficientnet":
        assert all(kind != "all-reduce" for kind, _ in found)  # rows never leave their devices


def _layers(config: llama.Config | bert.Config) -> int:
    return config.num_layers


def _heads_on_a_device(config: llama.Config | bert.Config, parts: int) -> int:
    """Key heads that travel: a part of them, or all where they do not divide."""
    heads = config.num_kv_heads if isinstance(config, llama.Config) else config.num_heads
    return heads // parts if heads % parts == 0 else heads


def test_every_family_is_in_the_matrix() -> None:
    listed = {case.model for case in cases()}
    assert listed == set(MODELS)
    assert {case.layout for case in cases()} >= {
        "1d",
        "2d",
        "gathered",
        "kv-batch",
        "ring",
        "rows",
        "columns",
        "blocks",
    }


def test_a_wrong_result_is_noticed() -> None:
    found, _ = run("cnn", "1d", "data=1")
    assert np.abs(found - np.roll(found, 1, axis=0)).max() / np.abs(found).max() > 100 * TOLERANCE
