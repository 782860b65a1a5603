"""One engine over several processes gives what it gives in one: 1 × 8, 2 × 4 and 4 × 2 devices, every family."""

import json
from pathlib import Path

import numpy as np
import pytest

from spmd_infer.models.registry import FAMILIES
from tests.multihost.processes import Ranks
from tests.references.letters import write_tokenizer
from tests.references.llama_variants import write_checkpoint
from tests.references.lora_adapters import random_adapter

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.demo]

TOLERANCE = 1e-5
"""Float32, relative to the largest value; sums over devices are taken in another order."""

SHAPES = ((1, 8), (2, 4), (4, 2))
PROGRAM = Path(__file__).with_name("zoo_rank.py")

Results = dict[str, np.ndarray]


def llama(folder: Path) -> Path:
    """A small random decoder whose tokenizer has a token for every byte but the last few."""
    write_checkpoint(folder, "gqa", eos_token_id=0)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, minilm: Path, efficientnet: Path
) -> dict[tuple[int, int], list[Results]]:
    """What every rank has found, in each shape of the job."""
    models = tmp_path_factory.mktemp("models")
    decoder, adapter = llama(models / "llama"), random_adapter(models / "adapter")
    every = {}
    for processes, devices in SHAPES:
        folder = tmp_path_factory.mktemp(f"{processes}x{devices}")
        arguments = [str(path) for path in (folder, decoder, adapter, minilm, efficientnet)]
        with Ranks(PROGRAM.read_text(), processes, folder, *arguments, devices=devices) as ranks:
            codes = ranks.wait(400)
            assert set(codes.values()) == {0}, json.dumps([ranks.err(rank) for rank in codes])
        every[processes, devices] = [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(processes)]
    return every


@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_every_family_gives_the_same_on_any_number_of_processes(
    family: str, found: dict[tuple[int, int], list[Results]]
) -> None:
    (one,) = found[1, 8]
    names = [name for name in one if name.startswith(f"{family} on ") and one[name].dtype.kind == "f"]
    assert names
    for name in names:
        scale = max(1.0, float(np.abs(one[name]).max()))
        others = [rank[name] for shape in SHAPES[1:] for rank in found[shape]]
        worst = max(float(np.abs(other - one[name]).max()) / scale for other in others)
        print(f"\n{name}, shape {one[name].shape}: largest difference {worst:.1e} of the largest value")
        assert worst <= TOLERANCE


def test_generation_token_for_token(found: dict[tuple[int, int], list[Results]]) -> None:
    (one,) = found[1, 8]
    (name,) = [name for name in one if name.endswith(": tokens")]
    drawn, adapted = (name.replace("tokens", what) for what in ("drawn", "adapted"))
    for shape in SHAPES[1:]:
        for rank in found[shape]:
            np.testing.assert_array_equal(rank[name], one[name])
            np.testing.assert_array_equal(rank[drawn], found[shape][0][drawn])
            np.testing.assert_array_equal(rank[adapted], one[adapted])
    assert (one[adapted][0] != one[name][0]).any()
    assert (one[adapted][1] == one[name][1]).all()


def test_what_rank_0_says_before_a_turn_does_not_grow_with_the_batch(
    found: dict[tuple[int, int], list[Results]],
) -> None:
    for shape in SHAPES[1:]:
        (one, fifteen) = found[shape][0]["llama on data=2,model=4: bytes a step"]
        print(f"\n{shape[0]} processes: {one} and {fifteen} bytes a step with 1 and 15 requests")
        assert abs(fifteen - one) <= 2  # as the messages' numbers grow
        assert 32 < fifteen < 100
