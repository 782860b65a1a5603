"""Several decode steps in one dispatch (``lax.scan``) beside one dispatch for each: milliseconds a step.

    python benchmarks/steps_per_dispatch.py [--model demo:smollm2] [--quantize int8] [--rows 1,32] [--steps 4]

Both run the same steps over the same pages: every row decodes greedily, and no row ends. They take turns; figures are
medians.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

import spmd_infer as si
from spmd_infer.generation.batches import Layout
from spmd_infer.generation.dispatcher import Dispatcher
from spmd_infer.generation.kv_pages import KVPages, pages_axes
from spmd_infer.generation.page_tables import PageTables
from spmd_infer.generation.sampling import sampling_flags
from spmd_infer.generation.slots import Slots
from spmd_infer.generation.steps import Choice, Rows, choose, forward

PAGES_OF_A_ROW = 4


def steps_of(count: int) -> Callable[..., tuple[jax.Array, KVPages, Slots]]:
    """So many decode steps as one function of the model."""

    def run(model: Any, pages: KVPages, state: Slots, rows: Rows, choice: Choice) -> tuple[jax.Array, KVPages, Slots]:
        def step(carry: tuple[KVPages, Slots], _: None) -> tuple[tuple[KVPages, Slots], jax.Array]:
            logits, pages = forward(model, *carry, rows)
            chosen, state, _none = choose(model, logits, carry[1], None, choice)
            return (pages, state), chosen.tokens

        (pages, state), tokens = jax.lax.scan(step, (pages, state), None, length=count)
        return tokens, pages, state

    return run


def measure(engine: si.Engine, rows: int, steps: int, rounds: int) -> tuple[float, float]:
    """Milliseconds of a step: alone in its dispatch, and as one of several."""
    config: Any = engine.config
    dispatcher = Dispatcher(engine, config, (), slots=rows, num_pages=PAGES_OF_A_ROW * rows)
    tables = PageTables(rows, PAGES_OF_A_ROW * rows, PAGES_OF_A_ROW)
    for row in range(rows):
        tables.add(row, 0, range(PAGES_OF_A_ROW * row, PAGES_OF_A_ROW * (row + 1)))
    layout = Layout.of([0] * rows, 1, lambda count: count)
    taken = dispatcher.rows(layout, layout.ints(range(rows)), [tables], 0, 64 * PAGES_OF_A_ROW)
    choice = Choice(taken.slots, sampling_flags([]), None, None, None)  # type: ignore[arg-type]  # numpy
    axes = pages_axes(config, dispatcher._format)
    together = engine.jit(f"steps_{steps}", steps_of(steps), donate=(0, 1), out_axes=(None, axes, None))
    readings: list[list[float]] = [[], []]
    for _ in range(rounds + 1):  # the first compiles
        for several in (False, True):
            begin = time.perf_counter()
            if several:
                _, dispatcher._pages, dispatcher._state = together(dispatcher._pages, dispatcher._state, taken, choice)
            for _ in range(0 if several else steps):
                dispatcher.choose(dispatcher.forward(taken), taken, layout, (), ruled=False)
            jax.block_until_ready(dispatcher._state)
            readings[several].append(1e3 * (time.perf_counter() - begin) / steps)
    return statistics.median(readings[0][1:]), statistics.median(readings[1][1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--rows", default="1,32")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    engine = si.Engine.load(options.model, mesh="data=1,model=1", quantize=options.quantize)
    print(f"load {os.getloadavg()[0]:.1f}\n")
    print(f"| rows | one step a dispatch, ms | {options.steps} steps, ms each |\n|---|---|---|")
    for rows in map(int, options.rows.split(",")):
        alone, several = measure(engine, rows, options.steps, options.rounds)
        print(f"| {rows} | {alone:.1f} | {several:.1f} |", flush=True)


if __name__ == "__main__":
    main()
