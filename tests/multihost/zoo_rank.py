"""What each rank of a job runs in test_engine: every family of the zoo, and all the ways to give and get batches.

    python tests/multihost/zoo_rank.py FOLDER LLAMA ADAPTER MINILM EFFICIENTNET

Writes FOLDER/rank0.npz, rank1.npz, …, one array for each result; checks here what one rank can check alone.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spmd_infer as si
from spmd_infer.multihost.job import Job

DIGITS = "tests/fixtures/digits_cnn"


def pictures(job: Job, mesh: str, images: np.ndarray) -> dict[str, np.ndarray]:
    """The small CNN, with batches from rank 0 and from all, and results in each of the places they can go."""
    import jax

    engine = si.Engine.load(DIGITS, mesh=mesh)
    batch = {"image": images} if job.rank == 0 else None
    (scores,) = jax.tree.leaves(engine.infer(batch))
    first = engine.infer(batch, results="first")
    assert (first is None) == (job.rank != 0)
    placed = engine.infer(batch, results="placed")
    assert all(isinstance(leaf, jax.Array) and len(leaf) == len(images) for leaf in jax.tree.leaves(placed))
    sizes = (5, len(images), 1)
    stream = [{"image": images[:n]} for n in sizes] if job.rank == 0 else ()
    assert tuple(len(jax.tree.leaves(result)[0]) for result in engine.infer_stream(stream)) == sizes
    (mean,) = jax.tree.leaves(engine.infer(batch, aggregate=si.Mean()))
    with pytest.raises(si.SpmdInferError, match="wrong keys in the batch"):
        engine.infer({"wrong": images} if job.rank == 0 else None)
    (again,) = jax.tree.leaves(engine.infer(batch))  # the engine is as usable as before, on every rank
    assert np.array_equal(scores, again)
    check_local(job, engine, mesh, images, scores)
    return {"scores": scores, "mean": mean}


def check_local(job: Job, engine: si.Engine, mesh: str, images: np.ndarray, scores: np.ndarray) -> None:
    """Every rank gives rows of its own, the last one most of them."""
    import jax

    begin = job.rank * 3
    end = len(images) if job.rank == job.size - 1 else begin + 3
    batch = {"image": images[begin:end]}
    if job.size == 4 and "model=4" in mesh:
        with pytest.raises(si.SpmdInferError, match="does not split the rows of a batch by process"):
            engine.infer_local(batch)
        return
    (local,) = jax.tree.leaves(engine.infer_local(batch))
    assert local.shape == scores[begin:end].shape
    assert np.abs(local - scores[begin:end]).max() <= 1e-5 * np.abs(scores).max()


def other_pictures(job: Job, path: str, mesh: str) -> dict[str, np.ndarray]:
    """EfficientNet-Lite on noise."""
    noise = np.random.default_rng(2).normal(size=(3, 224, 224, 3)).astype(np.float32)
    engine = si.Engine.load(path, mesh=mesh, buckets=[4])
    return {"logits": np.asarray(engine.infer({"image": noise} if job.rank == 0 else None))}


def sentences(path: str, mesh: str) -> dict[str, np.ndarray]:
    """MiniLM, packed over the data axis."""
    engine = si.Engine.load(path, mesh=mesh, dtype="float32")
    return {"vectors": engine.embed([f"sentence {n} says " + "word " * (n % 11) for n in range(40)])}


def decoder(job: Job, path: str, adapter: str, mesh: str) -> dict[str, np.ndarray]:
    """A small Llama: its logits, and tokens chosen in each of the ways that all ranks must choose alike."""
    engine = si.Engine.load(path, mesh=mesh, dtype="float32")
    ids = np.random.default_rng(3).integers(5, 90, (4, 16), np.int32)
    logits = np.asarray(engine.infer({"input_ids": ids} if job.rank == 0 else None))
    prompts = np.random.default_rng(1).integers(5, 90, (4, 12)).tolist()
    common: dict[str, Any] = {"max_tokens": 6, "min_tokens": 6}
    params = [
        si.SamplingParams(**common),
        si.SamplingParams(**common),
        si.SamplingParams(**common, temperature=1.0, seed=3),
        si.SamplingParams(**common, temperature=2.0),  # rank 0 draws its seed
    ]
    found = engine.generate(prompts, params) if job.rank == 0 else engine.generate(None)
    tokens = np.array([completion.token_ids for completion in found])
    adapted = with_adapter(job, engine, adapter, prompts[:2], params[0])
    found_alone = replicated(job, engine) if job.size > 1 else {}
    return {"logits": logits, "tokens": tokens[:3], "drawn": tokens[3], **adapted, **found_alone}


def with_adapter(
    job: Job, engine: si.Engine, adapter: str, prompts: list[list[int]], params: si.SamplingParams
) -> dict[str, np.ndarray]:
    """One of two prompts continued with an adapter that every rank loads, and both scored with it."""
    first = job.rank == 0
    engine.load_adapter("poet", adapter)
    found = engine.generate(prompts if first else None, params, adapter=["poet", None] if first else None)
    scores = np.stack(engine.score(prompts if first else None, adapter="poet" if first else None))
    with pytest.raises(si.SpmdInferError, match=r"nowhere|the adapter, files"):  # the ranks' messages differ
        engine.load_adapter("other", f"nowhere{job.rank}")
    engine.drop_adapter("poet")
    return {"adapted": np.array([completion.token_ids for completion in found]), "scores with adapter": scores}


def replicated(job: Job, engine: si.Engine) -> dict[str, np.ndarray]:
    """Schedulers that take the same turns: streams that rank 0 leads, and callers that fail in the middle of one."""
    rank, loop = job.rank, engine.task("generate").loop
    prompts = np.random.default_rng(4).integers(5, 90, (3, 12)).tolist()
    params = si.SamplingParams(max_tokens=24, min_tokens=24)
    texts = [completion.text for completion in engine.generate(prompts, params)]
    assert "".join(engine.stream(prompts[0] if rank == 0 else None, params)) == texts[0]

    for leaver in (
        0,
        1,
    ):  # who leaves its stream after the first piece; rank 0 ends it for all, another only for itself
        pieces = engine.stream(prompts[0] if rank == 0 else None, params)
        taken = next(pieces)
        if rank == leaver:
            pieces.close()  # type: ignore[attr-defined]  # it is a generator
        taken += "".join(pieces)
        assert (taken == texts[0]) == (leaver == 1 and rank != leaver), (leaver, taken)
        assert texts[0].startswith(taken)

    def fail(index: int, text: str) -> None:
        raise LookupError(f"of rank {rank}")

    for failing in (0, 1):
        on_text = fail if rank == failing else None
        if on_text is not None:
            with pytest.raises(LookupError, match=f"of rank {rank}"):
                engine.generate(prompts, params, on_text=on_text)
            continue
        reasons = {completion.finish_reason for completion in engine.generate(prompts, params)}
        assert reasons == {"cancelled" if failing == 0 else "length"}
    assert not loop.scheduler.parts[0].running
    assert [completion.text for completion in engine.generate(prompts, params)] == texts
    return {"bytes a step": np.array([bytes_a_step(job, engine, prompts[:1]), bytes_a_step(job, engine, prompts * 5)])}


def bytes_a_step(job: Job, engine: si.Engine, prompts: list[list[int]]) -> int:
    """What rank 0 sends before each turn, HMAC and all."""
    task = engine.task("generate")
    sent, said = job.channel.sent_bytes, task.loop.said
    task(prompts, si.SamplingParams(max_tokens=24, min_tokens=24))
    assert task.loop.said > said
    return (job.channel.sent_bytes - sent) // (task.loop.said - said)


def main(folder: str, llama: str, adapter: str, minilm: str, efficientnet: str) -> None:
    """Run all of it; results are named family, mesh and what they are."""
    images = np.random.default_rng(0).normal(size=(37, 32, 32, 1)).astype(np.float32)
    found: dict[str, np.ndarray] = {}

    def keep(family: str, mesh: str, results: dict[str, np.ndarray]) -> None:
        found.update({f"{family} on {mesh}: {name}": value for name, value in results.items()})

    with si.initialize(quiet=True) as job:
        for mesh in ("data=8", "data=2,model=4"):
            keep("cnn", mesh, pictures(job, mesh, images))
        keep("efficientnet-lite", "data=2,model=4", other_pictures(job, efficientnet, "data=2,model=4"))
        keep("bert", "data=4,model=2", sentences(minilm, "data=4,model=2"))
        keep("llama", "data=2,model=4", decoder(job, llama, adapter, "data=2,model=4"))
        np.savez(Path(folder) / f"rank{job.rank}.npz", **found)  # type: ignore[arg-type]  # its stubs know no **arrays


if __name__ == "__main__":
    main(*sys.argv[1:])
