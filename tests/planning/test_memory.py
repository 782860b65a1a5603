"""Memory and communication that are planned, against what XLA does, for models of the sizes that users run.

``python benchmarks/memory.py`` prints all cases; docs/layouts.md has the table.
"""

import pytest

from benchmarks.memory import Case, cases, measure
from spmd_infer.planning.verify import MEMORY_TOLERANCE


def slow(case: Case) -> bool:
    """All meshes of a layout take minutes; the first one says most."""
    first = next(each for each in cases() if (each.model, each.layout) == (case.model, case.layout))
    return case != first and not case.model.startswith("CNN")


def marks(case: Case) -> list[pytest.MarkDecorator]:
    """How a case is run."""
    return [pytest.mark.slow] if slow(case) else []


@pytest.mark.parametrize("case", [pytest.param(case, id=str(case), marks=marks(case)) for case in cases()])
def test_memory_of_models_that_users_run(case: Case) -> None:
    report = measure(case)
    planned, found = report.memory
    assert found == pytest.approx(planned, rel=MEMORY_TOLERANCE), report
    # Weights, cache, inputs and results are known but for a few scalars.
    assert report.held[1] == pytest.approx(report.held[0], rel=1e-3, abs=4096)
    assert all(line.explained for line in report.traffic), [line for line in report.traffic if not line.explained]
