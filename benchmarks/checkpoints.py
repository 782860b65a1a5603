"""How fast checkpoints are loaded, resharded and converted, and in how much memory, against copying the same bytes.

    python benchmarks/checkpoints.py --folder EMPTY_FOLDER [--gigabytes 8] [--json FILE] [--steps copy,load,reshard,...]

A synthetic checkpoint of a Llama's shape (bfloat16, Hugging Face folder, random numbers) is made in the folder, which
needs room for four of its size. Every step runs in a process of its own; "rate" is the checkpoint's bytes over wall
time, starting Python, all checking and flushing to the disk included; "work" leaves out the start, which does not grow
with the checkpoint. "beyond" is the process's peak resident memory (interpreter and libraries included), for loading
minus the arrays themselves.

``cp`` of the same bytes runs before and after every step, and a step is compared with the mean of the two: how fast
memory and disks of a virtual machine are changes from minute to minute. "flushed" counts the time until the disk holds
the copy, which the steps that write always wait for and ``cp`` does not. The load of the machine, and processor time,
say how much else was going on.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

COMMAND = str(Path(sys.executable).parent / "spmd-infer")
LIMIT_BEYOND = 512 << 20
HIDDEN, MLP, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 8, 64000
CHAIN = (("data=2,model=4", 2), ("data=8,model=1", 8), ("data=1,model=8", 8), ("data=2,model=4", 2))
STEPS = ("copy", "load", "reshard", "convert", "verify")


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    head_dim = HIDDEN // HEADS
    result: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(layers):
        start = f"model.layers.{layer}."
        result |= {
            f"{start}input_layernorm.weight": (HIDDEN,),
            f"{start}self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{start}self_attn.k_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{start}self_attn.v_proj.weight": (KV_HEADS * head_dim, HIDDEN),
            f"{start}self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{start}post_attention_layernorm.weight": (HIDDEN,),
            f"{start}mlp.gate_proj.weight": (MLP, HIDDEN),
            f"{start}mlp.up_proj.weight": (MLP, HIDDEN),
            f"{start}mlp.down_proj.weight": (HIDDEN, MLP),
        }
    return result | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def make(folder: Path, nbytes: int) -> int:
    """A checkpoint of about that size; returns its bytes."""

    def size(layers: int) -> int:
        return sum(int(np.prod(shape)) * 2 for shape in shapes(layers).values())

    layers = next(count for count in range(1, 1000) if size(count) >= nbytes)
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": MLP,
        "num_hidden_layers": layers, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "vocab_size": VOCAB, "tie_word_embeddings": False, "rms_norm_eps": 1e-5, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in shapes(layers).items():
        count = int(np.prod(shape)) * 2
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + count]}
        offset += count
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Random bits, but for one that keeps every number finite.
    pool = (np.random.default_rng(0).integers(0, 1 << 16, 32 << 20, np.uint16) & 0xBFFF).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        left = offset
        while left:  # each round begins elsewhere in the pool, so that no two tensors are the same
            start = left % 65521 * 2
            left -= file.write(pool[start : start + left])
        os.fsync(file.fileno())
    return offset


def timed(command: list[str], environment: dict[str, str] | None = None) -> tuple[float, int, float, str]:
    """Seconds, peak resident bytes, seconds of processor time, and standard output of a command."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | (environment or {}))
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.perf_counter() - begin
    return seconds, usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime, output


def copy(source: Path, target: Path) -> tuple[float, float, float]:
    """Seconds of ``cp``, seconds until the disk holds the copy, and of processor time."""
    os.sync()
    seconds, _, processor, _ = timed(["cp", "-r", str(source), str(target)])
    begin = time.perf_counter()
    os.sync()
    flushed = seconds + time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds, flushed, processor


def load_here(path: str, mesh: str) -> dict[str, Any]:
    """Load a checkpoint in this process: seconds, peak and array bytes."""
    import jax

    from spmd_infer import Engine

    jax.device_put(np.ones(8)).block_until_ready()
    begin = time.perf_counter()
    engine = Engine.load(path, mesh=mesh)
    jax.block_until_ready(engine.params)
    seconds = time.perf_counter() - begin
    buffers = {
        shard.data.unsafe_buffer_pointer(): shard.data.nbytes
        for array in engine.params.values()
        for shard in array.addressable_shards
    }
    return {"seconds": seconds, "arrays": sum(buffers.values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty folder on the disk to measure")
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_here(*options.load)))
        return
    if options.folder is None:
        parser.error("--folder is needed")
    steps = options.steps.split(",")
    folder: Path = options.folder
    source = folder / "source"
    nbytes = make(source, int(options.gigabytes * 1e9))
    largest = VOCAB * HIDDEN * 2
    rows: list[dict[str, Any]] = []
    copies: list[tuple[float, float, float]] = []
    ceilings(nbytes, source / "model.safetensors")

    def copied() -> None:
        if "copy" in steps:
            copies.append(copy(source, folder / "copy"))

    def note(step: str, seconds: float, work: float, processor: float, peak: int, beyond: int | None = None) -> None:
        before = len(copies) - 1
        copied()
        pair = copies[before:] if before >= 0 else []
        beside = {
            key: sum(taken[i] for taken in pair) / len(pair) if pair else None
            for i, key in enumerate(("cp", "cp_flushed"))
        }
        row = {"step": step, "seconds": seconds, "work": work, "processor_seconds": processor, "peak": peak}
        row |= {"beyond": peak if beyond is None else beyond, "load": os.getloadavg()[0], **beside}
        rows.append(row)
        print(line(row, nbytes), flush=True)

    def cli(step: str, *arguments: str) -> dict[str, Any]:
        seconds, peak, processor, output = timed([COMMAND, *arguments, "--json"])
        result: dict[str, Any] = json.loads(output.splitlines()[-1])
        note(step, seconds, result.get("seconds", seconds), processor, peak)
        return result

    print(f"{nbytes / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB")
    copied()
    current = source
    if "reshard" in steps:
        for number, (mesh, hosts) in enumerate(CHAIN):
            target = folder / f"reshard-{number}"
            cli(
                f"reshard to {mesh}, {hosts} hosts",
                "reshard",
                str(current),
                str(target),
                "--mesh",
                mesh,
                "--hosts",
                str(hosts),
            )
            if current != source:
                shutil.rmtree(current)
            current = target
    if "load" in steps:
        environment = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, __file__, "--load", str(current), "data=2,model=4"]
        _, peak, processor, output = timed(command, environment)
        loaded = json.loads(output.splitlines()[-1])
        note("load on data=2,model=4", loaded["seconds"], loaded["seconds"], processor, peak, peak - loaded["arrays"])
    if "verify" in steps and current != source:
        answer = cli("verify", "verify", str(current))
        assert all(problem["kind"] == "values" for problem in answer["problems"]), answer["problems"][:3]
    if "convert" in steps:
        cli("convert to huggingface", "convert", str(current), str(folder / "back"), "--to", "huggingface")
        if current != source:
            shutil.rmtree(current)
        answer = cli("diff with the source", "diff", str(source), str(folder / "back"))
        assert answer["equal"], answer["differences"][:3]
        shutil.rmtree(folder / "back")
    for child in folder.iterdir():
        shutil.rmtree(child)
    allowed = largest + LIMIT_BEYOND
    print(f"memory: at most {max(row['beyond'] for row in rows) >> 20} MiB beyond, allowed {allowed >> 20}")
    if options.json:
        options.json.write_text(json.dumps({"bytes": nbytes, "largest": largest, "rows": rows}, indent=1) + "\n")


def line(row: dict[str, Any], nbytes: int) -> str:
    """One step's figures as a line."""
    text = (
        f"{row['step']:<34}{row['seconds']:>6.1f} s {nbytes / row['seconds'] / 1e6:>6.0f} MB/s  work "
        f"{nbytes / row['work'] / 1e6:>6.0f} MB/s  processors {row['processor_seconds']:>5.1f} s  beyond "
        f"{row['beyond'] >> 20:>5} MiB  load {row['load']:.1f}"
    )
    if row["cp"] is not None:
        text += (
            f"   {row['cp'] / row['seconds']:>5.0%} of cp ({nbytes / row['cp'] / 1e6:.0f} MB/s; work "
            f"{row['cp'] / row['work']:.0%}), {row['cp_flushed'] / row['seconds']:>5.0%} of cp flushed"
        )
    return text


def ceilings(nbytes: int, file: Path) -> None:
    """What bounds every step: digesting, in one thread and in two, and reading from the page cache."""
    block = np.random.default_rng(1).bytes(16 << 20)

    def rate(work: Callable[[], Any], size: int, threads: int = 1) -> float:
        begin = time.perf_counter()
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda _: work(), range(threads)))
        return threads * size / (time.perf_counter() - begin) / 1e6

    def read() -> None:
        with file.open("rb", buffering=0) as opened:
            memory = bytearray(1 << 20)
            while opened.readinto(memory):
                pass

    rates = {f"read {nbytes / 1e9:.1f} GB": rate(read, nbytes)}
    for name, digest in (("SHA-256", hashlib.sha256), ("BLAKE3", blake3)):
        for threads in (1, 2):
            work = functools.partial(_many, digest, block)
            rates[f"{name} in {threads} threads"] = rate(work, _TIMES * len(block), threads)
    print("MB/s: " + ", ".join(f"{name} {value:.0f}" for name, value in rates.items()))


_TIMES = 30


def _many(digest: Any, block: bytes) -> None:
    for _ in range(_TIMES):
        digest(block).digest()


if __name__ == "__main__":
    main()
