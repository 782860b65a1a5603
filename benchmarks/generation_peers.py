"""C++ programs that run a decoder, as contenders of ``generation.py``. Each is imported only when asked for.

``llama.cpp`` wants ``llama-cpp-python`` built for this machine; as PyPI has it only as source:

    CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX512_BF16=ON" \\
        pip install --no-binary llama-cpp-python llama-cpp-python
"""

import ctypes
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

Run = Callable[[np.ndarray, int], tuple[float, float]]
"""Takes prompts ``[rows, tokens]`` and how many tokens to add; gives the seconds to the first and to the last."""


_kept: list[object] = []
"""What C code calls later on, which Python would free."""


def timed(seconds: Callable[[np.ndarray, int], float]) -> Run:
    """From how long it takes to add so many tokens: the first is the prompt's, the others are decoded."""
    return lambda prompts, new: (seconds(prompts, 1), seconds(prompts, new))


def ctranslate2_peer(folder: Path, tokenizer: str, compute_type: str) -> Run:
    """CTranslate2, its weights made from a Hugging Face folder, which gets the text of a ``tokenizer.json``."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter

    (folder / "tokenizer.json").write_text(tokenizer)
    ends = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **ends}))
    converted = folder.parent / f"ctranslate2-{compute_type}"
    if not converted.exists():
        TransformersConverter(str(folder)).convert(str(converted), quantization=compute_type)
    threads = len(os.sched_getaffinity(0))
    generator = ctranslate2.Generator(str(converted), compute_type=compute_type, intra_threads=threads)
    vocabulary: list[str] = json.loads((converted / "vocabulary.json").read_text())

    def seconds(prompts: np.ndarray, count: int) -> float:
        tokens = [[vocabulary[token] for token in prompt] for prompt in prompts.tolist()]
        begin = time.perf_counter()
        generator.generate_batch(
            tokens,
            max_batch_size=len(tokens),
            min_length=count,
            max_length=count,
            sampling_topk=1,
            include_prompt_in_result=False,
        )
        return time.perf_counter() - begin

    return timed(seconds)


def llama_cpp_file(path: Path, kind: str, folder: Path) -> Path:
    """A GGUF file quantised anew, from one of any kind."""
    import llama_cpp

    target = folder / f"{kind}.gguf"
    if not target.exists():
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
        params.allow_requantize = True
        failed = llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), ctypes.byref(params))
        if failed:
            raise RuntimeError(f"llama.cpp did not make {kind} of {path}")
    return target


def llama_cpp_peer(path: Path) -> Run:
    """llama.cpp over its own programming interface: all rows in one batch, as its server runs them; greedy."""
    import llama_cpp as lib

    silent = lib.llama_log_callback(lambda *_: None)
    _kept.append(silent)
    lib.llama_log_set(silent, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    threads = len(os.sched_getaffinity(0))

    def seconds(prompts: np.ndarray, count: int) -> float:
        rows, length = prompts.shape
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max = rows * (length + count + 8), rows
        params.n_batch, params.n_ubatch = 2048, 512
        params.n_threads = params.n_threads_batch = threads
        params.kv_unified = True
        context = lib.llama_init_from_model(model, params)
        batch = lib.llama_batch_init(2048, 0, 1)

        def put(entries: list[tuple[int, int, int, bool]]) -> None:
            batch.n_tokens = len(entries)
            for place, (token, position, row, wanted) in enumerate(entries):
                batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, position, 1
                batch.seq_id[place][0], batch.logits[place] = row, wanted
            if lib.llama_decode(context, batch):
                raise RuntimeError("llama.cpp refused a batch")

        def best(place: int) -> int:
            logits = lib.llama_get_logits_ith(context, place)
            return int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax())

        begin = time.perf_counter()
        last: list[int] = []
        for row, prompt in enumerate(prompts.tolist()):
            for start in range(0, length, 2048):
                piece = prompt[start : start + 2048]
                put([(token, start + i, row, start + i == length - 1) for i, token in enumerate(piece)])
            last.append(best(batch.n_tokens - 1))
        for step in range(count - 1):
            put([(token, length + step, row, True) for row, token in enumerate(last)])
            last = [best(row) for row in range(rows)]
        taken = time.perf_counter() - begin
        lib.llama_batch_free(batch)
        lib.llama_free(context)
        return taken

    return timed(seconds)
