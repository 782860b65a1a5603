"""Bad words as tokens: each spelling that a text may contain, whose last token is then held back."""

from __future__ import annotations

from collections.abc import Sequence

from spmd_infer.errors import TaskError
from spmd_infer.generation.token_rules import TokenIds
from spmd_infer.generation.token_state import MAX_BAD_WORD_TOKENS
from spmd_infer.generation.tokenizer import Tokenizer


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer, vocab_size: int) -> tuple[TokenIds, ...]:
    """The token sequences of bad words: as the tokenizer writes each at a text's start, and after a space.

    Other ways to cut the same letters into tokens are not found, as in vLLM.

    Args:
        words: the texts.
        tokenizer: the model's.
        vocab_size: of the logits.

    Raises:
        TaskError: a word has more tokens than are remembered, or one outside the vocabulary.
    """
    found: dict[TokenIds, None] = {}
    for word in words:
        for text in (word.lstrip() or word, f" {word.lstrip()}"):
            ids = tuple(tokenizer.encode(text, add_special=False))
            if not ids:
                continue
            if len(ids) > MAX_BAD_WORD_TOKENS:
                raise TaskError(f"bad_words: {word!r} has {len(ids)} tokens; the most is {MAX_BAD_WORD_TOKENS}")
            if max(ids) >= vocab_size:
                raise TaskError(f"bad_words: {word!r} has token {max(ids)}; the vocabulary has {vocab_size}")
            found[ids] = None
    return tuple(found)


__all__ = ["bad_word_ids"]
