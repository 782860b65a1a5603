"""Writes tests/fixtures/llama_smollm2.npz: what transformers makes of SmolLM2-135M-Instruct, in float32.

    python tests/references/llama_smollm2.py SMOLLM2_GGUF_FILE LITERATURE_TEXT

Needs torch, transformers, gguf and accelerate (extra `parity`), the demo weights, and the file `literature` of Debian's
package fortunes-min.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPT = "The capital of France is"
NEW_TOKENS = 16
TOKENS, WINDOWS = 2044, 4
# Every twelfth column of the logits: 4,096 of 49,152.
STRIDE = 12


@torch.no_grad()
def main(weights: Path, literature: Path, output: Path) -> None:
    """Write the greedy continuation, logits at the prompt's positions, and the perplexity of a text."""
    where = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt", add_special_tokens=False).input_ids
    ids = prompt
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    logits = model(prompt).logits[0]
    text = literature.read_text(encoding="utf-8")
    windows = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[0, :TOKENS].reshape(WINDOWS, -1)
    losses = []
    for window in windows:
        scores = torch.log_softmax(model(window[None]).logits[0, :-1], -1)
        losses.append(-scores.gather(1, window[1:, None])[:, 0])
    continuation = ids[0, prompt.shape[1] :]
    print(repr(tokenizer.decode(continuation)))
    print("perplexity", torch.cat(losses).double().mean().exp().item())
    np.savez_compressed(
        output,
        prompt=PROMPT,
        prompt_ids=prompt[0].numpy(),
        continuation_ids=continuation.numpy(),
        continuation=tokenizer.decode(continuation),
        logits=logits[:, ::STRIDE].numpy(),
        logsumexp=torch.logsumexp(logits, -1).numpy(),
        windows=windows.numpy().astype(np.int32),
        window_loss=np.array([loss.double().mean().item() for loss in losses]),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(__file__).parents[1] / "fixtures" / "llama_smollm2.npz")
