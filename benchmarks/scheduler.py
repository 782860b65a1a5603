"""What the scheduler costs: microseconds a step by running and queued sequences, and 10,000 requests from end to end.

Nothing is computed: a step's tokens are there at once, and are accepted one step late as the decode loop does. Lengths
are lognormal, like those of chats (prompts: median 90, mean 220; outputs: median 130, mean 210).

    python benchmarks/scheduler.py [--json FILE]
"""

import argparse
import gc
import json
import platform
import resource
import statistics
import sys
import time
from collections import deque
from pathlib import Path

import numpy as np

from spmd_infer.generation.limits import Limits
from spmd_infer.generation.scheduler import Scheduler
from spmd_infer.generation.sequences import Sequence
from spmd_infer.generation.step_plan import StepPlan

STEPS, ROUNDS = 50, 30
REQUESTS = 10_000
POOLS = (400, 160)  # pages for 32 slots: plenty, and too few


def limits(slots: int, num_pages: int) -> Limits:
    return Limits(
        slots=slots, num_pages=num_pages, page_size=64, context_len=4096, token_budget=slots + 512, max_chunk=512
    )


def token_count(plan: StepPlan) -> int:
    return len(plan.decodes) + sum(chunk.last for chunk in plan.prefills)


def read(scheduler: Scheduler, plan: StepPlan) -> None:
    """Accept a plan's tokens; end the sequences that have all of theirs."""
    produced = [chunk.sequence for chunk in plan.prefills if chunk.last] + plan.decodes
    for sequence in produced:
        scheduler.accept(sequence.id, (11,))
        if sequence.outputs >= sequence.max_tokens:
            scheduler.finish(sequence.id)


class Steady:
    """All slots decode, none ends, and so many wait."""

    def __init__(self, running: int, queued: int) -> None:
        self.scheduler = Scheduler(limits(running, running * 40))
        for number in range(running + queued):
            self.scheduler.add(Sequence(number, range(64), 2400, deadline=1e9))
        self.unread = deque([self.scheduler.plan(0.0)])
        while self.scheduler.num_waiting > queued or not self.scheduler.num_running:
            self.step()

    def step(self) -> tuple[float, float]:
        """Plan one step and accept the one before; returns the seconds of the first and of both."""
        begin = time.perf_counter()
        plan = self.scheduler.plan(0.0)
        planned = time.perf_counter()
        self.unread.append(plan)
        read(self.scheduler, self.unread.popleft())
        return planned - begin, time.perf_counter() - begin


def step_times(running: int, queues: tuple[int, ...]) -> list[dict[str, object]]:
    cases = {queued: Steady(running, queued) for queued in queues}
    times: dict[int, list[tuple[float, float]]] = {queued: [] for queued in queues}
    for _ in range(ROUNDS):
        for queued, case in cases.items():
            times[queued] += [case.step() for _ in range(STEPS)]
    return [
        {
            "running": running,
            "queued": queued,
            "plan_us": statistics.median(planned for planned, _ in times[queued]) * 1e6,
            "plan_and_accept_us": statistics.median(both for _, both in times[queued]) * 1e6,
        }
        for queued in queues
    ]


def all_requests(num_pages: int) -> dict[str, object]:
    random = np.random.default_rng(0)
    prompts = np.clip(random.lognormal(4.5, 1.34, REQUESTS), 4, 2048).astype(int)
    outputs = np.clip(random.lognormal(4.87, 0.98, REQUESTS), 1, 1024).astype(int)
    scheduler = Scheduler(limits(32, num_pages))
    begin = time.perf_counter()
    for number, (prompt, output) in enumerate(zip(prompts.tolist(), outputs.tolist(), strict=True)):
        ids = random.integers(0, 30_000, prompt).tolist()
        scheduler.add(Sequence(number, ids, output))
    added = time.perf_counter() - begin
    unread: deque[StepPlan] = deque()
    tenths = []
    steps = tokens = preempted = 0
    gc.collect()
    begin = last = time.perf_counter()
    last_steps = last_tokens = 0
    while len(scheduler):
        plan = scheduler.plan(0.0)
        preempted += len(plan.preempted)
        unread.append(plan)
        if len(unread) > 1:
            read(scheduler, unread.popleft())
        steps += 1
        tokens += token_count(plan)
        if REQUESTS - len(scheduler) >= (len(tenths) + 1) * REQUESTS // 10:
            now = time.perf_counter()
            tenths.append(
                {
                    "tokens_a_step": (tokens - last_tokens) / (steps - last_steps),
                    "us_a_step": (now - last) / (steps - last_steps) * 1e6,
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                }
            )
            last, last_steps, last_tokens = now, steps, tokens
    pool = scheduler.parts[0].pool
    pool.check()
    return {
        "requests": REQUESTS,
        "num_pages": num_pages,
        "add_us": added / REQUESTS * 1e6,
        "seconds": time.perf_counter() - begin,
        "steps": steps,
        "tokens": tokens,
        "preempted": preempted,
        "pages_in_use_at_the_end": pool.used,
        "tenths": tenths,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    print(f"Python {sys.version.split()[0]}, {platform.machine()}")
    print("running  queued  plan, µs  plan + accept, µs")
    rows = [row for running in (1, 32, 128) for row in step_times(running, (10, REQUESTS))]
    for row in rows:
        print(f"{row['running']:7}  {row['queued']:6}  {row['plan_us']:8.1f}  {row['plan_and_accept_us']:17.1f}")
    wholes = [all_requests(num_pages) for num_pages in POOLS]
    for whole in wholes:
        print({name: value for name, value in whole.items() if name != "tenths"})
        for name in ("tokens_a_step", "us_a_step", "peak_mib"):
            print(f"{name:14}", *(f"{tenth[name]:7.1f}" for tenth in whole["tenths"]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"steps": rows, "requests": wholes}, indent=1))


if __name__ == "__main__":
    main()
