"""One engine over several processes gives what it gives in one: 1 × 8, 2 × 4 and 4 × 2 devices, every family."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from spmd_infer.models.registry import FAMILIES
from tests.multihost.processes import Ranks
from tests.references.llama_variants import write_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.demo]

TOLERANCE = 1e-5
"""Float32, relative to the largest value; sums over devices are taken in another order."""

SHAPES = ((1, 8), (2, 4), (4, 2))
PROGRAM = Path(__file__).with_name("zoo_rank.py")

Results = dict[str, np.ndarray]


def llama(folder: Path) -> Path:
    """A small random decoder whose tokenizer has a token for every byte but the last few."""
    write_checkpoint(folder, "gqa", eos_token_id=0)
    letters = sorted(ByteLevel.alphabet())[:127]
    tokenizer = Tokenizer(
        BPE(vocab={"<eos>": 0} | {letter: place + 1 for place, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def found(
    tmp_path_factory: pytest.TempPathFactory, minilm: Path, efficientnet: Path
) -> dict[tuple[int, int], list[Results]]:
    """What every rank has found, in each shape of the job."""
    decoder = llama(tmp_path_factory.mktemp("models") / "llama")
    every = {}
    for processes, devices in SHAPES:
        folder = tmp_path_factory.mktemp(f"{processes}x{devices}")
        arguments = [str(folder), str(decoder), str(minilm), str(efficientnet)]
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
    drawn = name.replace("tokens", "drawn")
    for shape in SHAPES[1:]:
        for rank in found[shape]:
            np.testing.assert_array_equal(rank[name], one[name])
            np.testing.assert_array_equal(rank[drawn], found[shape][0][drawn])


def test_what_rank_0_says_before_a_turn_does_not_grow_with_the_batch(
    found: dict[tuple[int, int], list[Results]],
) -> None:
    for shape in SHAPES[1:]:
        (one, fifteen) = found[shape][0]["llama on data=2,model=4: bytes a step"]
        print(f"\n{shape[0]} processes: {one} and {fifteen} bytes a step with 1 and 15 requests")
        assert abs(fifteen - one) <= 2  # as the messages' numbers grow
        assert 32 < fifteen < 100
