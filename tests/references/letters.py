"""A tokenizer of single letters for the models of ``llama_variants``, whose vocabulary has 128 tokens."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel


def write_tokenizer(folder: Path) -> None:
    """``tokenizer.json``: the end token 0, and a token for each of 127 bytes."""
    letters = sorted(ByteLevel.alphabet())[:127]
    vocabulary = {"<eos>": 0} | {letter: place + 1 for place, letter in enumerate(letters)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))
