"""How fast checkpoints are loaded, resharded and converted, and in how much memory, against copying the same bytes.

    python benchmarks/checkpoints.py --folder FOLDER [--gigabytes 8] [--rounds 3] [--steps reshard-0,...]

A synthetic checkpoint of a Llama's shape (bfloat16, Hugging Face folder, random numbers) is made in the folder, which
needs room for four of its size; one that is there from an earlier call, with ``--keep``, is used again, so that the
steps can be measured in several calls. Every step runs in a process of its own, three times, each time after ``cp -r``
of what the step reads, and once more after the last; medians are compared. Before each of them, what it reads is read
once, so that it lies in the page cache, other files of the folder are not in it, and what the one before wrote is gone.

"rate" is the checkpoint's bytes over wall time, starting Python, all checking and flushing to the disk included; "work"
leaves out the start, which does not grow with the checkpoint. "cp" is without flushing, "flushed" until the disk holds
the copy, which the steps that write always wait for. "beyond" is the process's peak resident memory (interpreter and
libraries included), for loading minus the arrays themselves. "others" are processor seconds that other processes took
meanwhile: figures with more than a second or two of them say little.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import os
import shutil
import statistics
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
STEPS = ("ceilings", *(f"reshard-{number}" for number in range(len(CHAIN))), "load", "verify", "convert")
SIMULATED = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}


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


def made(folder: Path, nbytes: int) -> int:
    """Make a checkpoint of about that size, unless it is there; returns its bytes."""

    def size(layers: int) -> int:
        return sum(int(np.prod(shape)) * 2 for shape in shapes(layers).values())

    layers = next(count for count in range(1, 1000) if size(count) >= nbytes)
    if folder.exists():
        return size(layers)
    folder.mkdir(parents=True)
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


def warm(wanted: Path, folder: Path) -> None:
    """Have the page cache hold what is wanted, and nothing else of the folder; nothing is waiting to be written."""
    os.sync()
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb", buffering=0) as opened:
            if file.is_relative_to(wanted):
                memory = bytearray(1 << 20)
                while opened.readinto(memory):
                    pass
            else:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> tuple[float, float]:
    """Seconds of ``cp``, and until the disk holds the copy."""
    seconds, _, _, _ = timed(["cp", "-r", str(source), str(target)])
    begin = time.perf_counter()
    os.sync()
    flushed = seconds + time.perf_counter() - begin
    shutil.rmtree(target)
    return seconds, flushed


def processors() -> float:
    """Seconds that the machine's processors have worked since it began."""
    try:
        words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    except OSError:
        return float("nan")
    user, nice, system, _, _, irq, softirq = map(int, words[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


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
    return {"work": seconds, "arrays": sum(buffers.values())}


class Bench:
    """Steps, each beside ``cp`` of what it reads.

    Attributes:
        rows: the figures of the steps so far.
    """

    def __init__(self, folder: Path, nbytes: int, rounds: int) -> None:
        self._folder, self._nbytes, self._rounds = folder, nbytes, rounds
        self.rows: list[dict[str, Any]] = []

    def step(self, name: str, source: Path, target: Path | None, command: list[str]) -> dict[str, Any]:
        """Measure one step; what its last round made stays. Returns the last round's answer."""
        copies, runs, answer = [], [], {}
        for _ in range(self._rounds):
            if target is not None and target.exists():
                shutil.rmtree(target)
            warm(source, self._folder)
            copies.append(copy(source, self._folder / "copy"))
            warm(source, self._folder)
            before = processors()
            seconds, peak, processor, output = timed(command, SIMULATED)
            answer = json.loads(output.splitlines()[-1])
            others = processors() - before - processor
            runs.append((seconds, answer.get("work", answer.get("seconds", seconds)), processor, others, peak))
        warm(source, self._folder)
        copies.append(copy(source, self._folder / "copy"))
        cp, flushed = (statistics.median(each) for each in zip(*copies, strict=True))
        seconds, work, processor, others = (statistics.median(each) for each in list(zip(*runs, strict=True))[:4])
        row = {"step": name, "seconds": seconds, "work": work, "processor_seconds": processor, "others": others}
        row |= {"beyond": max(run[4] for run in runs) - answer.get("arrays", 0), "cp": cp, "cp_flushed": flushed}
        row |= {"copies": copies, "runs": runs, "load": os.getloadavg()[0]}
        self.rows.append(row)
        print(line(row, self._nbytes), flush=True)
        return answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a folder on the disk to measure: empty, or kept from before")
    parser.add_argument("--gigabytes", type=float, default=8)
    parser.add_argument("--rounds", type=int, default=3, help="how often each step is measured")
    parser.add_argument("--steps", default=",".join(STEPS), help=f"some of {','.join(STEPS)}")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints for the next call")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load_here(*options.load)))
        return
    if options.folder is None:
        parser.error("--folder is needed")
    steps, folder = options.steps.split(","), options.folder
    source = folder / "source"
    nbytes = made(source, int(options.gigabytes * 1e9))
    largest = VOCAB * HIDDEN * 2
    print(f"{nbytes / 1e9:.2f} GB, largest tensor {largest / 2**20:.0f} MiB")
    if "ceilings" in steps:
        ceilings(nbytes, source / "model.safetensors")
    bench = Bench(folder, nbytes, options.rounds)
    for number in range(len(CHAIN)):
        if f"reshard-{number}" in steps:
            reshard(bench, folder, number)
    native = newest(folder)
    if "load" in steps:
        command = [sys.executable, __file__, "--load", str(native), "data=2,model=4"]
        bench.step("load on data=2,model=4", native, None, command)
    if "verify" in steps and native != source:
        answer = bench.step("verify", native, None, [COMMAND, "verify", str(native), "--json"])
        assert all(problem["kind"] == "values" for problem in answer["problems"]), answer["problems"][:3]
    if "convert" in steps:
        back = folder / "back"
        arguments = ["convert", str(native), str(back), "--to", "huggingface", "--json"]
        bench.step("convert to huggingface", native, back, [COMMAND, *arguments])
        answer = bench.step("diff with the source", source, None, [COMMAND, "diff", str(source), str(back), "--json"])
        assert answer["equal"], answer["differences"][:3]
        shutil.rmtree(back)
    if not options.keep:
        for child in folder.iterdir():
            shutil.rmtree(child)
    allowed = largest + LIMIT_BEYOND
    print(f"memory: at most {max(row['beyond'] for row in bench.rows) >> 20} MiB beyond, allowed {allowed >> 20}")
    if options.json:
        figures = {"bytes": nbytes, "largest": largest, "rows": bench.rows}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def reshard(bench: Bench, folder: Path, number: int) -> None:
    """Measure one of the reshards, of what the one before made, which then goes."""
    current, target = newest(folder), folder / f"reshard-{number}"
    mesh, hosts = CHAIN[number]
    command = [COMMAND, "reshard", str(current), str(target), "--mesh", mesh, "--hosts", str(hosts), "--json"]
    bench.step(f"reshard to {mesh}, {hosts} hosts", current, target, command)
    if current.name != "source":
        shutil.rmtree(current)


def newest(folder: Path) -> Path:
    """The checkpoint that was resharded last, or the one that all began with."""
    return max(folder.glob("reshard-*"), default=folder / "source")


def line(row: dict[str, Any], nbytes: int) -> str:
    """One step's figures as a line."""
    return (
        f"{row['step']:<34}{row['seconds']:>6.1f} s {nbytes / row['seconds'] / 1e6:>6.0f} MB/s  work "
        f"{nbytes / row['work'] / 1e6:>6.0f} MB/s  processors {row['processor_seconds']:>5.1f} s, others "
        f"{row['others']:>4.1f}  beyond {row['beyond'] >> 20:>5} MiB   {row['cp'] / row['seconds']:>5.0%} of cp "
        f"({nbytes / row['cp'] / 1e6:.0f} MB/s; work {row['cp'] / row['work']:.0%}), "
        f"{row['cp_flushed'] / row['seconds']:>5.0%} of cp flushed"
    )


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
