"""One engine over several processes gives what it gives in one: 1 × 8, 2 × 4 and 4 × 2 devices."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from tests.multihost.processes import Ranks
from tests.references.llama_variants import write_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

TOLERANCE = 1e-5
"""Float32; sums over devices are taken in another order."""

SHAPES = ((1, 8), (2, 4), (4, 2))

CNN = """
import sys
import numpy as np
import spmd_infer as si

mesh, folder = sys.argv[1:3]
with si.initialize(quiet=True) as job:
    import jax

    engine = si.Engine.load("tests/fixtures/digits_cnn", mesh=mesh)
    images = np.random.default_rng(0).normal(size=(37, 32, 32, 1)).astype(np.float32)
    batch = {"image": images} if job.rank == 0 else None
    everyone = engine.infer(batch)
    first = engine.infer(batch, results="first")
    assert (first is None) == (job.rank != 0)
    stream = [{"image": images[:n]} for n in (5, 37, 1)] if job.rank == 0 else ()
    lengths = [len(jax.tree.leaves(result)[0]) for result in engine.infer_stream(stream)]
    assert lengths == [5, 37, 1], lengths
    placed = engine.infer(batch, results="placed")
    assert all(isinstance(leaf, jax.Array) and leaf.shape[0] == 37 for leaf in jax.tree.leaves(placed))
    mean = engine.infer(batch, aggregate=si.Mean())
    try:
        engine.infer({"wrong": images} if job.rank == 0 else None)
    except si.SpmdInferError as error:
        assert "wrong keys in the batch" in str(error)
    else:
        raise AssertionError("a bad batch was taken")
    again = engine.infer(batch)  # the engine is as usable as before, on every rank
    own = images[job.rank * 3 : 37 if job.rank == job.size - 1 else job.rank * 3 + 3]  # the last rank has most
    try:
        (local,) = jax.tree.leaves(engine.infer_local({"image": own}))
    except si.SpmdInferError as error:
        assert job.size == 4 and "model=4" in mesh and "does not split the rows of a batch by process" in str(error)
        local = own  # not compared
    else:
        begin = job.rank * 3
        (expected,) = jax.tree.leaves(everyone)
        assert local.shape == expected[begin : begin + len(own)].shape
        assert np.abs(local - expected[begin : begin + len(own)]).max() <= 1e-5 * np.abs(expected).max()
    (scores,), (scores_again,), (mean,) = (jax.tree.leaves(tree) for tree in (everyone, again, mean))
    assert np.array_equal(scores, scores_again)
    np.savez(f"{folder}/rank{job.rank}.npz", scores=scores, mean=mean)
"""

MINILM = """
import sys
import numpy as np
import spmd_infer as si

mesh, folder, model = sys.argv[1:4]
with si.initialize(quiet=True) as job:
    engine = si.Engine.load(model, mesh=mesh, dtype="float32")
    texts = [f"sentence {n} says " + "word " * (n % 11) for n in range(40)]
    np.savez(f"{folder}/rank{job.rank}.npz", vectors=engine.embed(texts))
"""

LLAMA = """
import sys
import numpy as np
import spmd_infer as si

mesh, folder, model = sys.argv[1:4]
with si.initialize(quiet=True) as job:
    engine = si.Engine.load(model, mesh=mesh, dtype="float32")
    prompts = np.random.default_rng(1).integers(5, 90, (4, 12)).tolist()
    greedy = si.SamplingParams(max_tokens=6, min_tokens=6)
    sampled = si.SamplingParams(max_tokens=6, min_tokens=6, temperature=1.0, seed=3)
    drawn = si.SamplingParams(max_tokens=6, min_tokens=6, temperature=2.0)  # rank 0 draws its seed
    params = [greedy, greedy, sampled, drawn]
    found = engine.generate(prompts, params) if job.rank == 0 else engine.generate(None)
    ids = np.array([completion.token_ids for completion in found])
    np.savez(f"{folder}/rank{job.rank}.npz", ids=ids[:3], drawn=ids[3])
"""


def run(program: str, shape: tuple[int, int], mesh: str, folder: Path, *arguments: str) -> list[dict[str, np.ndarray]]:
    """What every rank has saved."""
    processes, devices = shape
    folder = folder / f"{processes}x{devices}"
    folder.mkdir()
    with Ranks(program, processes, folder, mesh, str(folder), *arguments, devices=devices) as ranks:
        codes = ranks.wait(240)
        assert set(codes.values()) == {0}, json.dumps([ranks.err(rank) for rank in codes])
    return [dict(np.load(folder / f"rank{rank}.npz")) for rank in range(processes)]


def compare(program: str, mesh: str, folder: Path, *arguments: str) -> None:
    (one,), *others = (run(program, shape, mesh, folder, *arguments) for shape in SHAPES)
    worst = 0.0
    for ranks in others:
        for rank in ranks:
            for name, expected in one.items():
                scale = max(1.0, float(np.abs(expected).max()))
                worst = max(worst, float(np.abs(rank[name] - expected).max()) / scale)
    print(f"\n{mesh}: largest difference {worst:.1e} of the largest value")
    assert worst <= TOLERANCE


@pytest.mark.parametrize("mesh", ["data=8", "data=2,model=4"])
def test_pictures(mesh: str, tmp_path: Path) -> None:
    compare(CNN, mesh, tmp_path)


def test_sentences(tmp_path: Path, minilm: Path) -> None:
    compare(MINILM, "data=4,model=2", tmp_path, str(minilm))


def test_generation_token_for_token(tmp_path: Path) -> None:
    model = tmp_path / "llama"
    write_checkpoint(model, "gqa", eos_token_id=0)
    letters = sorted(ByteLevel.alphabet())[:127]
    tokenizer = Tokenizer(
        BPE(vocab={"<eos>": 0} | {letter: place + 1 for place, letter in enumerate(letters)}, merges=[])
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(model / "tokenizer.json"))
    (one,), *others = (run(LLAMA, shape, "data=2,model=2", tmp_path, str(model)) for shape in ((1, 4), (2, 2), (4, 1)))
    for ranks in others:
        for rank in ranks:
            np.testing.assert_array_equal(rank["ids"], one["ids"])
            np.testing.assert_array_equal(rank["drawn"], ranks[0]["drawn"])
