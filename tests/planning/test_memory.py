"""Memory that is planned, against what XLA assigns, for models of the sizes that users run.

``python benchmarks/memory.py`` prints all cases; docs/layouts.md has the table.
"""

import pytest

from benchmarks.memory import Case, cases, measure
from spmd_infer.planning.verify import MEMORY_TOLERANCE

# What is not planned to 10 %, and why. A case that has come right must leave the list.
_UNEVEN = (
    "14 and 7 rows or columns do not divide: XLA cuts them unevenly and exchanges parts for every place of a window"
)
KNOWN = {
    **{("EfficientNet-Lite0 infer", layout, "seq=4"): _UNEVEN for layout in ("rows", "columns")},
    ("EfficientNet-Lite0 infer", "blocks", "data=2,seq=2"): _UNEVEN,
    ("EfficientNet-Lite0 infer", "blocks", "data=2,seq=2,model=2"): _UNEVEN,
    ("CNN infer", "blocks", "data=2,seq=2,model=2"): "copies of parts with the edges of two neighbours",
}


def slow(case: Case) -> bool:
    """All meshes of a layout take minutes; the first one says most."""
    first = next(each for each in cases() if (each.model, each.layout) == (case.model, case.layout))
    return case != first and not case.model.startswith("CNN")


def marks(case: Case) -> list[pytest.MarkDecorator]:
    """How a case is run."""
    why = KNOWN.get((case.model, case.layout, case.mesh))
    expected = [] if why is None else [pytest.mark.xfail(strict=True, reason=why)]
    return [*expected, pytest.mark.slow] if slow(case) else expected


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=marks(case)) for case in cases()])
def test_memory_of_models_that_users_run(case: Case) -> None:
    report = measure(case)
    planned, found = report.memory
    assert found == pytest.approx(planned, rel=MEMORY_TOLERANCE), report
    # Weights, cache, inputs and results are known but for a few scalars.
    assert report.held[1] == pytest.approx(report.held[0], rel=1e-3, abs=4096)
