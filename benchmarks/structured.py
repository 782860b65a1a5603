"""Structured output on a real model: whether every text fits its schema, and what the shape costs for each token.

    python benchmarks/structured.py [--model demo:smollm2] [--quantize int8] [--count 500] [--costs] [--json FILE]

``count`` requests at temperature 1, each with one of ten schemas and a seed of its own (from ``--first`` on), are run
32 at a time; each text is parsed and validated by ``jsonschema``. With ``--costs`` the same rows are then run with and
without a shape, and with and without jump-ahead, for what a token costs.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

import spmd_infer as si
from spmd_infer.tasks.completions import Completion


def _object(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


_NAME = {"type": "string", "minLength": 1, "maxLength": 20}
_COUNT = {"type": "integer", "minimum": 0, "maximum": 999}

SCHEMAS: dict[str, dict[str, Any]] = {
    "a person": _object(first_name=_NAME, last_name=_NAME, age={"type": "integer", "minimum": 0, "maximum": 120}),
    "a book": _object(title=_NAME, pages=_COUNT, in_print={"type": "boolean"}),
    "the weather": _object(
        city=_NAME,
        temperature_celsius={"type": "number", "minimum": -60, "maximum": 60},
        sky={"enum": ["clear", "rain"]},
    ),
    "a route": _object(start=_NAME, stops={"type": "array", "items": _NAME, "minItems": 1, "maxItems": 3}),
    "a call of a function": _object(
        name={"const": "set_alarm"},
        arguments=_object(hour={"type": "integer", "minimum": 0, "maximum": 23}, label=_NAME),
    ),
    "a choice": {"enum": ["yes", "no", "perhaps", None, 3]},
    "numbers": {"type": "array", "items": _COUNT, "minItems": 2, "maxItems": 5},
    "an order": _object(
        customer=_object(name=_NAME, premium={"type": "boolean"}),
        lines={"type": "array", "minItems": 1, "maxItems": 2, "items": _object(item=_NAME, amount=_COUNT)},
    ),
    "one of two": {
        "anyOf": [_object(kind={"const": "circle"}, radius=_COUNT), _object(kind={"const": "square"}, side=_COUNT)]
    },
    "a date": {"type": "string", "pattern": "^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9])$"},
}


def requests(count: int, first: int = 0, **shape: Any) -> tuple[list[str], list[si.SamplingParams]]:
    """Prompts and parameters at temperature 1, the schemas in turn, each with a seed of its own from ``first`` on."""
    names = [list(SCHEMAS)[index % len(SCHEMAS)] for index in range(count)]
    params = [
        si.SamplingParams(
            max_tokens=400,
            temperature=1.0,
            seed=seed,
            structured_outputs=si.StructuredOutputs(json=SCHEMAS[name], **shape),
        )
        for seed, name in enumerate(names, first)
    ]
    return [f"Describe {name} as JSON:\n" for name in names], params


def faults(completions: list[Completion]) -> list[str]:
    """What is wrong with each text that does not fit its schema, the schemas in turn."""
    found = []
    for index, completion in enumerate(completions):
        schema = list(SCHEMAS.values())[index % len(SCHEMAS)]
        if completion.finish_reason != "stop":
            found.append(f"{index}: ended by {completion.finish_reason} ({completion.error}): {completion.text!r}")
            continue
        try:
            jsonschema.Draft202012Validator(schema).validate(json.loads(completion.text))
        except (ValueError, jsonschema.ValidationError) as error:
            found.append(f"{index}: {error}: {completion.text!r}")
    return found


def token_seconds(engine: si.Engine, rows: int, shaped: bool, compact: bool, rounds: int) -> tuple[float, float]:
    """Seconds that a decoded token takes in a batch of so many rows, and tokens for each of its steps."""
    readings, per_step = [], []
    times = engine.task("generate").loop.times
    for _ in range(rounds + 1):  # the first compiles
        prompts, params = requests(rows, compact=compact)
        if not shaped:
            params = [si.SamplingParams(max_tokens=48, temperature=1.0, seed=p.seed, ignore_eos=True) for p in params]
        times.clear()
        begin = time.perf_counter()
        compiled = engine.compile_seconds
        done = engine.generate(prompts, params)
        seconds = time.perf_counter() - begin - (engine.compile_seconds - compiled)
        tokens = sum(len(each.token_ids) for each in done)
        readings.append(seconds / tokens)
        per_step.append(tokens / max(1, times.steps["decode"]) / rows)
    return statistics.median(readings[1:]), statistics.median(per_step[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--quantize", default=None)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--costs", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = si.Engine.load(options.model, mesh="data=1,model=1", quantize=options.quantize)
    engine.task("generate", si.GenerationOptions(max_rows=32))
    begin, wrong, tokens = time.perf_counter(), [], []
    for start in range(0, options.count, 100):
        done = engine.generate(*requests(min(100, options.count - start), options.first + start))
        wrong += faults(done)
        tokens += [len(each.token_ids) for each in done]
        print(f"{len(tokens) - len(wrong)} of {len(tokens)} fit", flush=True)
    seconds = time.perf_counter() - begin
    if tokens:
        print(f"{sum(tokens)} tokens, {seconds:.0f} s with compiling; load {os.getloadavg()[0]:.1f}")
        print(f"tokens of a text: median {np.median(tokens):.0f}, most {max(tokens)}")
    print(*wrong[:5], sep="\n")
    results = []
    if options.costs:
        columns = "rows | shape | jump-ahead | ms a token | against no shape | tokens a row and step"
        print(f"\n| {columns} |\n|{'---|' * 6}")
    for rows in (1, 8, 32) if options.costs else ():
        free = 0.0
        for shaped, compact, jump in ((0, 0, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1)):
            engine.task("generate", si.GenerationOptions(max_rows=32, jump_ahead=bool(jump)))
            each, per_step = token_seconds(engine, rows, bool(shaped), bool(compact), options.rounds)
            free = free or each
            shape = ("none", "any layout", "compact")[shaped + compact]
            cells = (rows, shape, ("no", "yes")[jump], f"{1e3 * each:.2f}", f"{each / free:.2f}", f"{per_step:.2f}")
            print(f"| {' | '.join(map(str, cells))} |", flush=True)
            results.append({"rows": rows, "shape": shape, "jump": bool(jump), "ms": 1e3 * each, "per_step": per_step})
    if options.json:
        said = {"fit": len(tokens) - len(wrong), "of": options.count, "faults": wrong, "results": results}
        options.json.write_text(json.dumps(said, indent=1) + "\n")


if __name__ == "__main__":
    main()
