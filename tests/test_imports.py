"""Modules depend on each other one way, imports inside functions and those for types alone included."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"spmd_infer": "spmd_infer", "models": "spmd_infer.models", "checkpoints": "spmd_infer.checkpoints"}


def modules() -> dict[str, Path]:
    found = {}
    for folder, name in PACKAGES.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if folder == "spmd_infer" and parts[0] in ("models", "checkpoints"):
                continue  # links to the folders of their own
            found[".".join((name, *parts)).removesuffix(".__init__")] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            each = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in known else node.module for name in each}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def test_no_circles() -> None:
    known = modules()
    assert len(known) > 200
    graph = {name: imports(file, known) - {name} for name, file in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' <- '.join(error.args[1])}")
