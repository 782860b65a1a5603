"""The generation loop under load: a long queue, and requests that come and go while pages run out.

    python -m benchmarks.pressure queue [--requests 10000] [--layers 2] [--scale 1.0] [--json FILE]
    python -m benchmarks.pressure churn [--minutes 5] [--layers 2] [--seed 0] [--json FILE]

``queue`` hands in all requests at once, their lengths like those of chats, and looks at each tenth of them that has
ended: tokens per second, memory, and whether requests began in the order in which they came. ``churn`` lets requests
come and cancels some, in a cache of a few pages, so that others are preempted again and again; each text is compared
with that of a run with room for everything. ``--layers`` takes the first layers of SmolLM2 only: the loop is measured,
not the model.
"""

import argparse
import json
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import spmd_infer as si
from benchmarks.speculation import first_layers
from spmd_infer.generation.detokenizer import ByteTable, Detokenizer
from spmd_infer.generation.generation_options import GenerationOptions
from spmd_infer.generation.kv_pages import PAGE_SIZE, page_bytes
from spmd_infer.generation.loop import GenerationLoop
from spmd_infer.generation.requests import Request
from spmd_infer.generation.sampling_params import SamplingParams
from spmd_infer.models.cache_formats import CacheFormat


class Requests:
    """Makes requests for one model whose text does not matter.

    Args:
        vocab_size: of the model.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size, self._table, self._made = vocab_size, ByteTable([b"."] * vocab_size, frozenset()), 0

    def make(self, prompt: list[int], new: int) -> Request:
        """One that takes the likeliest tokens, so many of them."""
        self._made += 1
        return Request(
            f"{self._made}.0",
            prompt,
            SamplingParams(max_tokens=new, ignore_eos=True, seed=0),
            ends=frozenset(),
            detokenizer=Detokenizer(self._table),
            vocab_size=self._vocab_size,
        )


@dataclass
class Tenth:
    """Tokens per second while a tenth of the requests ended, and memory then in MiB."""

    tokens_per_s: float
    memory: float


@dataclass
class QueueReport:
    """What became of a long queue."""

    requests: int
    tokens: int
    seconds: float
    tenths: list[Tenth]
    host_share: float
    preempted: int
    overtaken: int
    longest_wait_s: float


@dataclass
class ChurnReport:
    """What became of requests under pressure."""

    seconds: float
    ended: int
    cancelled: int
    wrong: int
    preempted: int
    turns: int


def chat_lengths(count: int, longest: int, scale: float = 1.0) -> list[tuple[int, int]]:
    """Prompt and output lengths, lognormal as ShareGPT's (prompts: median 90, mean 220; outputs: 130 and 210)."""
    random = np.random.default_rng(0)
    prompts = np.clip(scale * random.lognormal(4.5, 1.34, count), 4, 3 * longest // 4).astype(int)
    outputs = np.clip(scale * random.lognormal(4.87, 0.98, count), 1, longest // 4).astype(int)
    return list(zip(prompts.tolist(), outputs.tolist(), strict=True))


def run_queue(loop: GenerationLoop, vocab_size: int, lengths: list[tuple[int, int]]) -> QueueReport:
    """All requests at once; the report's tenths are of those that have ended."""
    random, maker = np.random.default_rng(1), Requests(vocab_size)
    requests = [maker.make(random.integers(0, vocab_size, prompt).tolist(), new) for prompt, new in lengths]
    for request in requests:
        loop.submit([request])
    preempted = _count_preemptions(loop)
    loop.times.clear()
    tenths, running, tokens = [], set(requests), 0
    begin = last = loop.clock()
    ends = [len(requests) * (10 - step) // 10 for step in range(1, 11)]
    last_tokens = 0
    while running:
        loop.turn()
        if len(loop.scheduler) <= ends[0]:
            done = {request for request in running if request.finish_reason is not None}
            running -= done
            tokens = sum(len(request.token_ids) for request in requests)
            now = loop.clock()
            tenths.append(Tenth((tokens - last_tokens) / (now - last), _resident()))
            last, last_tokens = now, tokens
            ends.pop(0)
    loop.turn()
    check_empty(loop)
    starts = [request.started or 0.0 for request in requests]
    latest = np.maximum.accumulate(starts)
    return QueueReport(
        len(requests),
        tokens,
        last - begin,
        tenths,
        loop.times.host_share,
        preempted[0],
        int((np.array(starts) < latest).sum()),
        max(starts) - begin,
    )


def run_churn(loop: GenerationLoop, roomy: GenerationLoop, vocab_size: int, seconds: float, seed: int) -> ChurnReport:
    """Requests come at random and some are cancelled, until the time is up.

    Args:
        loop: with few pages.
        roomy: with enough of them.
        vocab_size: of the model.
        seconds: how long.
        seed: of all that is random.
    """
    random, maker = np.random.default_rng(seed), Requests(vocab_size)
    common = random.integers(0, vocab_size, 2 * PAGE_SIZE).tolist()
    texts = []
    for _ in range(48):
        own = random.integers(0, vocab_size, int(random.integers(1, 3 * PAGE_SIZE))).tolist()
        texts.append((own if random.random() < 0.5 else common + own, int(random.integers(1, 2 * PAGE_SIZE))))
    expected = [maker.make(*text) for text in texts]
    for request in expected:
        roomy.submit([request])
    roomy.run(expected)
    preempted = _count_preemptions(loop)
    live: dict[Request, int] = {}
    ended = cancelled = wrong = turns = 0
    begin = loop.clock()  # it stands still while programs are compiled
    while live or loop.clock() < begin + seconds:
        while len(live) < 40 and random.random() < 0.6 and loop.clock() < begin + seconds:
            which = int(random.integers(len(texts)))
            request = maker.make(*texts[which])
            loop.submit([request], priority=int(random.integers(2)))
            live[request] = which
        if live and random.random() < 0.05:
            loop.cancel(list(live)[int(random.integers(len(live)))])
        loop.turn()
        turns += 1
        for request in [request for request in live if request.finish_reason is not None]:
            tokens = expected[live.pop(request)].token_ids
            ended += 1
            cancelled += request.finish_reason == "cancelled"
            whole = request.finish_reason == "length" and request.token_ids == tokens
            cut = request.finish_reason == "cancelled" and request.token_ids == tokens[: len(request.token_ids)]
            wrong += not (whole or cut)
        if turns % 64 == 0:
            for part in loop.scheduler.parts:
                part.pool.check()
    loop.turn()
    check_empty(loop)
    return ChurnReport(loop.clock() - begin, ended, cancelled, wrong, preempted[0], turns)


def few_pages(engine: si.Engine, rows: int, pages: int) -> GenerationOptions:
    """Options for a cache of so many pages in each part."""
    config: Any = engine.config
    platform = engine.mesh.devices.flat[0].platform
    each = page_bytes(config, CacheFormat.of("auto", platform, engine.dtype))
    return GenerationOptions(max_rows=rows, cache_bytes=pages * each * engine.data_parts)


def check_empty(loop: GenerationLoop) -> None:
    """Refuse a loop that still holds something, though nothing runs.

    Raises:
        RuntimeError: a page, a slot or a request is held.
    """
    for part in loop.scheduler.parts:
        part.pool.check()
        if part.pool.used or part.running or (part.tables.owner != part.tables.slots).any() or part.tables.shared:
            raise RuntimeError(f"part {part.index} holds {part.pool.used} pages and {len(part.running)} slots")
    if len(loop.scheduler):
        raise RuntimeError(f"{len(loop.scheduler)} requests are left")


def _count_preemptions(loop: GenerationLoop) -> list[int]:
    """A count that grows with every sequence that loses its pages from now on."""
    plan, count = loop.scheduler.plan, [0]

    def counted(now: float) -> Any:
        found = plan(now)
        count[0] += len(found.preempted)
        return found

    loop.scheduler.plan = counted  # type: ignore[method-assign]
    return count


def _resident() -> float:
    """MiB of memory that this process has."""
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if platform.system() == "Linux" else 0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("queue", "churn"))
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole = si.Engine.load(options.model, mesh="data=1,model=1", dtype="float32")
        path = first_layers(whole, options.layers, folder) if options.layers else options.model
        engine = si.Engine.load(path, mesh="data=1,model=1", dtype="float32", quantize=options.quantize)
    config: Any = engine.config
    report: QueueReport | ChurnReport
    if options.what == "queue":
        loop = GenerationLoop(engine, config, (), GenerationOptions(max_rows=options.rows))
        loop.warm_up(max_len=config.context_len, rules=False)
        report = run_queue(loop, config.vocab_size, chat_lengths(options.requests, config.context_len, options.scale))
        rates = [tenth.tokens_per_s for tenth in report.tenths]
        print(f"{report.requests} requests, {report.tokens:,} tokens in {report.seconds:.0f} s")
        print(f"tokens/s by tenths: {', '.join(f'{rate:,.0f}' for rate in rates)}")
        print(f"memory by tenths, MiB: {', '.join(f'{tenth.memory:,.0f}' for tenth in report.tenths)}")
        print(f"host share {report.host_share:.1%}, {report.preempted} preempted, {report.overtaken} began late")
    else:
        loop = GenerationLoop(engine, config, (), few_pages(engine, 16, 24))
        roomy = GenerationLoop(engine, config, (), GenerationOptions(max_rows=16))
        report = run_churn(loop, roomy, config.vocab_size, 60 * options.minutes, options.seed)
        print(
            f"{report.ended} requests in {report.seconds:.0f} s and {report.turns} turns: {report.cancelled} cancelled,"
        )
        print(f"{report.preempted} preempted, {report.wrong} with other tokens than without pressure; no page left")
    print(f"load {os.getloadavg()[0]:.1f}")
    if options.json:
        options.json.write_text(json.dumps(asdict(report), indent=1) + "\n")


if __name__ == "__main__":
    main()
