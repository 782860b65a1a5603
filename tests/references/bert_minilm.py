"""Writes tests/fixtures/bert_minilm.npz: what torch makes of a few sentences with MiniLM, in float32.

    python tests/references/bert_minilm.py MINILM_FOLDER

Needs torch and transformers (extra `parity`) and the folder of the demo weights.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

SENTENCES = [
    "A man is playing a guitar.",
    "Someone plays an instrument on stage while a large crowd listens.",
    "東京 is the capital of Japan, naïve café!",
    "?",
    "The stock market fell sharply on Tuesday after the central bank raised rates by half a point.",
]


@torch.no_grad()
def main(folder: Path, output: Path) -> None:
    """Write mean-pooled, normalised embeddings, and the hidden states of the first sentence."""
    tokenizer, model = (
        AutoTokenizer.from_pretrained(folder),
        AutoModel.from_pretrained(folder, dtype=torch.float32).eval(),
    )
    pooled = []
    for sentence in SENTENCES:  # one by one: no padding is involved
        hidden = model(**tokenizer(sentence, return_tensors="pt")).last_hidden_state[0]
        pooled.append(torch.nn.functional.normalize(hidden.mean(0), dim=0).numpy())
    first = model(**tokenizer(SENTENCES[0], return_tensors="pt")).last_hidden_state[0].numpy()
    np.savez_compressed(output, sentences=np.array(SENTENCES), embeddings=np.stack(pooled), hidden=first)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parents[1] / "fixtures" / "bert_minilm.npz")
