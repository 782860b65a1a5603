"""The fastest way of attention is measured once for each size, held against the plain one, and kept."""

import stat
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from spmd_infer.generation import attention_choice
from spmd_infer.generation.attention_choice import AttentionChoice
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.kept_answers import Answer, KeptAnswers
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.models.cache_formats import CacheFormat
from spmd_infer.models.page_attention import GATHERED, IN_PLACE, attend_in_place
from tests.generation.test_loop import EOS, engine, prompts, run

FLOATS = CacheFormat.of("auto", "cpu", np.float32)


def choice(file: Path, mesh: str = "data=1,model=1", fmt: CacheFormat = FLOATS) -> AttentionChoice:
    found = engine("tied", mesh)
    return AttentionChoice(found, found.config, fmt, file)


@pytest.mark.parametrize(
    ("mesh", "name"), [("data=1,model=1", "float32"), ("data=2,model=4", "int8"), ("data=8,model=1", "fp8")]
)
def test_candidates_run_on_real_shapes_once(tmp_path: Path, mesh: str, name: str) -> None:
    file, fmt = tmp_path / "attention.json", CacheFormat.of(name, "cpu", np.float32)
    first = choice(file, mesh, fmt)
    way = first.of_pages(1, 256, 4)
    (key, answer), *others = KeptAnswers(file).all().items()
    assert not others
    assert answer.way == way
    assert set(answer.milliseconds) == {IN_PLACE, GATHERED}
    assert not answer.left_out
    assert f"cache {name}" in key
    assert jax.__version__ in key
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    compiled = engine("tied", mesh).compiles
    again = choice(file, mesh, fmt)
    assert again.of_pages(1, 256, 4) == first.of_pages(1, 256, 4) == way
    assert engine("tied", mesh).compiles == compiled  # nothing was measured again


def test_nothing_is_measured_where_one_way_is_known_to_be_best(tmp_path: Path) -> None:
    used = choice(tmp_path / "attention.json")
    assert used.of_pages(8, 256, 16) == IN_PLACE  # rows fill the pool
    assert used.of_pages(1, 64, 4) == IN_PLACE  # too small to matter
    assert used.of_prompts(1, 64) == "xla"
    assert not list(tmp_path.iterdir())


def slower(*args: Any) -> jax.Array:
    def wait(x: np.ndarray) -> np.ndarray:
        time.sleep(0.05)
        return x

    found = attend_in_place(*args)
    return jax.pure_callback(wait, jax.ShapeDtypeStruct(found.shape, found.dtype), found)


def wrong(*args: Any) -> jax.Array:
    return attend_in_place(*args) * 1.1


def failing(*args: Any) -> jax.Array:
    raise RuntimeError(f"no kernel for {len(args)} arrays")


def test_a_way_that_is_wrong_or_fails_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "attention.json"
    used = choice(file)
    ways = {IN_PLACE: slower, "wrong": wrong, "failing": failing, "right": attend_in_place}
    assert used._fastest(ways, ("pages", 1, 9, 3), lambda: used._pages(1, 9, 3)) == "right"
    (answer,) = KeptAnswers(file).all().values()
    assert answer.left_out == {"wrong": "results differ by 0.1 of the largest", "failing": "no kernel for 5 arrays"}
    assert answer.milliseconds["right"] < answer.milliseconds[IN_PLACE]
    # One that is no faster is not taken.
    ways = {IN_PLACE: attend_in_place, "slower": slower}
    assert used._fastest(ways, ("pages", 1, 10, 3), lambda: used._pages(1, 10, 3)) == IN_PLACE
    monkeypatch.setattr(attention_choice, "_ROUNDS", 1)
    with pytest.raises(RuntimeError, match="no kernel"):
        used._fastest({IN_PLACE: failing, "right": attend_in_place}, ("pages", 1, 11, 3), lambda: used._pages(1, 11, 3))


def test_a_spoilt_file_is_done_without(tmp_path: Path) -> None:
    file = tmp_path / "attention.json"
    file.write_text("{")
    kept = KeptAnswers(file)
    assert kept.find("sizes", [IN_PLACE]) is None
    kept.keep("sizes", Answer(IN_PLACE, {IN_PLACE: 1.0}))
    assert KeptAnswers(file).find("sizes", [IN_PLACE]) == Answer(IN_PLACE, {IN_PLACE: 1.0})
    assert KeptAnswers(file).find("sizes", [GATHERED]) is None  # of a version that knew other ways
    tmp_path.chmod(0o777)  # others may have written it
    assert KeptAnswers(file).find("sizes", [IN_PLACE]) is None
    tmp_path.chmod(0o700)
    KeptAnswers(None).keep("sizes", Answer(IN_PLACE, {}))


@pytest.mark.parametrize("cache_dtype", ["float32", "int8"])
@pytest.mark.parametrize("mesh", ["data=1,model=1", "data=2,model=4"])
def test_tokens_are_the_same_with_pages_gathered(mesh: str, cache_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, params = engine("tied", mesh), SamplingParams(max_tokens=70, ignore_eos=True)

    def tokens() -> list[list[int]]:
        used = GenerationLoop(found, found.config, {EOS}, GenerationOptions(cache_dtype=cache_dtype))
        return run(used, prompts(), params)

    expected = tokens()
    monkeypatch.setattr(AttentionChoice, "of_pages", lambda *_: GATHERED)
    assert tokens() == expected
    assert any(program.name == "decode" for program in found.programs)
