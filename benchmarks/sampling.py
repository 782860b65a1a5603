"""What choosing the next token costs: the programs on the device, and the masks of structured output on the host.

    python benchmarks/sampling.py [rows] [vocabulary]

prints milliseconds for a batch (the median of runs in turns), then microseconds a row and token for masks of JSON
schemas and other shapes with SmolLM2's vocabulary.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from spmd_infer import demo
from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.generation.constraints import ConstraintCompiler, fill_masks
from spmd_infer.generation.sampling import SamplingArrays, SamplingParams, sample, sample_by_rules, sampling_arrays
from spmd_infer.generation.structured_outputs import StructuredOutputs
from spmd_infer.generation.token_rules import RuleWidths, TokenRules, rule_arrays
from spmd_infer.generation.token_state import TokenState, token_bits, token_state
from spmd_infer.generation.tokenizer import Tokenizer

ROUNDS = 25
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature": {"temperature": 1.0},
    "top-k 50": {"temperature": 1.0, "top_k": 50},
    "top-p 0.95": {"temperature": 1.0, "top_p": 0.95},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
    "rules: none": {},
    "rules: penalties": {"repetition_penalty": 1.1, "presence_penalty": 0.5},
    "rules: mask": {"allowed_token_ids": tuple(range(1000))},
    "rules: bias": {"logit_bias": {7: 1.0}},
    "rules: bad words": {"bad_words": ("x",)},
    "rules: logprobs": {"logprobs": 20},
}


def program(case: str, rows: int, vocab: int) -> Callable[[], Any]:
    """A call that chooses tokens for one batch."""
    params = [SamplingParams(seed=row, **CASES[case]) for row in range(rows)]
    logits = jax.numpy.asarray(np.random.default_rng(0).normal(0, 3, (rows, vocab)).astype(np.float32))
    steps = jax.numpy.zeros(rows, np.int32)
    sampling = jax.device_put(SamplingArrays(**sampling_arrays(params, ())))
    if not case.startswith("rules"):
        return partial(jax.jit(sample), logits, sampling, steps)
    bad = [((5, 6),) if each.bad_words else () for each in params]
    rules = jax.device_put(TokenRules(**rule_arrays(params, bad, RuleWidths())))
    state = jax.device_put(TokenState(**token_state([range(500)] * rows, [range(100)] * rows, vocab)))
    mask = jax.numpy.asarray(np.tile(token_bits(range(1000), vocab), (rows, 1)))
    chosen = jax.jit(partial(sample_by_rules, num_top=20))
    return partial(chosen, logits, sampling, steps, rules, state, mask)


def device_times(rows: int, vocab: int) -> None:
    calls = {case: program(case, rows, vocab) for case in CASES}
    times: dict[str, list[float]] = {case: [] for case in CASES}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(ROUNDS):
        for case, call in calls.items():
            began = time.perf_counter()
            jax.block_until_ready(call())
            times[case].append(time.perf_counter() - began)
    print(f"{rows} rows of {vocab} logits on {jax.devices()[0].device_kind}")
    for case, seconds in times.items():
        print(f"  {case:18} {statistics.median(seconds) * 1e3:6.2f} ms (least {min(seconds) * 1e3:.2f})")


def mask_times(rows: int) -> None:
    tokenizer = Tokenizer.from_reader(open_checkpoint(demo.demo_path("demo:smollm2")))
    vocab = tokenizer.vocab_size
    compiler = ConstraintCompiler(tokenizer, vocab)
    shapes = {
        "JSON schema": StructuredOutputs(json=PERSON),
        "any JSON object": StructuredOutputs(json_object=True),
        "regex": StructuredOutputs(regex=r"[A-Z][a-z]+(, [a-z]+){2,8}\."),
        "choice of 100": StructuredOutputs(choice=tuple(f"the {index}th answer" for index in range(100))),
    }
    rng = np.random.default_rng(0)
    print(f"masks of {vocab} tokens for {rows} rows")
    for name, shape in shapes.items():
        began = time.perf_counter()
        compiler.compile(shape)
        compiled = time.perf_counter() - began
        constraints = [compiler.compile(shape) for _ in range(rows)]
        masks = np.empty((rows, -(-vocab // 32)), np.uint32)
        fills, advances = [], []
        for _ in range(100):
            began = time.perf_counter()
            fill_masks(masks, constraints)
            fills.append(time.perf_counter() - began)
            tokens = [_any_token(mask, rng) for mask in masks]
            began = time.perf_counter()
            for constraint, token in zip(constraints, tokens, strict=True):
                constraint.advance(token)
            advances.append(time.perf_counter() - began)
            ended = [row for row, each in enumerate(constraints) if each.is_finished]
            for row in ended:  # another request takes the row
                constraints[row] = compiler.compile(shape)
        fill, advance = (np.array(each) / rows * 1e6 for each in (fills, advances))
        print(
            f"  {name:18} compile {compiled * 1e3:6.1f} ms; a row and token: mask {np.median(fill):5.1f} us, mean "
            f"{fill.mean():5.1f}, most {fill.max():6.1f}; advance {np.median(advance):4.1f} us"
        )


def _any_token(mask: np.ndarray, rng: np.random.Generator) -> int:
    allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
    return int(rng.choice(allowed))


if __name__ == "__main__":
    batch = int(sys.argv[1]) if len(sys.argv) > 1 else 32
    device_times(batch, int(sys.argv[2]) if len(sys.argv) > 2 else 49_152)
    mask_times(batch)
