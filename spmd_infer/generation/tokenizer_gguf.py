"""The tokenizer inside a GGUF file, from its ``tokenizer.ggml.*`` fields.

A GGUF file stores the vocabulary and, for byte-level BPE, the merges, but only the *name* of the pattern that splits
text into words before merging (``tokenizer.ggml.pre``). The patterns here are those of the models' ``tokenizer.json``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Core
from tokenizers.models import BPE, WordPiece

from spmd_infer.errors import CheckpointError

# Token types of the GGUF specification.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6

_GPT2 = ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais")
_DIGIT_BY_DIGIT = ("smollm", "starcoder", "refact", "codeshell", "exaone", "minerva-7b")
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_QWEN2 = ("qwen2", "deepseek-r1-qwen", "stablelm2")

# Contractions in any case; letters with one leading mark; runs of digits; punctuation; line ends; other space.
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split_words(pre: str) -> pre_tokenizers.PreTokenizer:
    whole_regex = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in _GPT2:
        return whole_regex
    if pre in _DIGIT_BY_DIGIT:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), whole_regex])
    if pre in _LLAMA3 or pre in _QWEN2:
        pattern = Regex(_SPLIT.format(digits="{1,3}" if pre in _LLAMA3 else ""))
        split = pre_tokenizers.Split(pattern, behavior="isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    known = ", ".join(sorted({*_GPT2, *_DIGIT_BY_DIGIT, *_LLAMA3, *_QWEN2}))
    raise CheckpointError(
        f"the GGUF file splits words by pattern {pre!r} (tokenizer.ggml.pre), which is not known here; known are "
        f"{known}. Put the model's tokenizer.json beside the file to use that instead"
    )


def _field(metadata: Mapping[str, Any], name: str, kind: str) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        raise CheckpointError(
            f"a GGUF tokenizer of kind {kind!r} needs the field tokenizer.ggml.{name}, which is missing"
        )
    return value


def _vocab(tokens: Sequence[str]) -> dict[str, int]:
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"the GGUF vocabulary lists {len(tokens)} tokens, but only {len(vocab)} different ones")
    return vocab


def _add_tokens(core: Core, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Make control and user-defined tokens match as a whole, before any splitting."""
    core.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL
        ]
    )
    core.add_tokens(
        [AddedToken(token, normalized=False) for token, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED]
    )


def _add_ends(core: Core, tokens: Sequence[str], metadata: Mapping[str, Any], *, bos: bool, eos: bool = False) -> None:
    """Put the begin and end tokens around a text where the file asks for them (or ``bos``, ``eos`` by default)."""
    template, special = ["$A"], []
    for name, first, default in (("bos", True, bos), ("eos", False, eos)):
        index = metadata.get(f"tokenizer.ggml.{name}_token_id")
        if index is None or not metadata.get(f"tokenizer.ggml.add_{name}_token", default):
            continue
        token = tokens[int(index)]
        template = [token, *template] if first else [*template, token]
        special.append((token, int(index)))
    if special:
        core.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)


def _byte_level(metadata: Mapping[str, Any]) -> Core:
    tokens, merges = _field(metadata, "tokens", "gpt2"), _field(metadata, "merges", "gpt2")
    pre = str(_field(metadata, "pre", "gpt2"))
    pairs = [tuple(merge.split(" ", 1)) for merge in merges]
    if any(len(pair) != 2 for pair in pairs):
        raise CheckpointError(
            f"tokenizer.ggml.merges: expected pairs like 'a b', found {merges[[len(p) for p in pairs].index(1)]!r}"
        )
    core = Core(BPE(_vocab(tokens), pairs, ignore_merges=pre in _LLAMA3))
    if pre in _QWEN2:
        core.normalizer = normalizers.NFC()
    core.pre_tokenizer = _split_words(pre)
    core.decoder = decoders.ByteLevel()
    _add_tokens(core, tokens, _field(metadata, "token_type", "gpt2"))
    _add_ends(core, tokens, metadata, bos=pre in _LLAMA3)
    return core


def _sentencepiece(metadata: Mapping[str, Any]) -> Core:
    """SentencePiece BPE: the pair whose joined piece scores best merges first, so scores order the merges."""
    tokens, types = _field(metadata, "tokens", "llama"), _field(metadata, "token_type", "llama")
    scores = _field(metadata, "scores", "llama")
    vocab = _vocab(tokens)
    merges: list[tuple[float, int, tuple[str, str]]] = []
    for index, piece in enumerate(tokens):
        if types[index] in (UNKNOWN, CONTROL, USER_DEFINED, BYTE):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                merges.append((-float(scores[index]), index, (left, right)))
    merges.sort(key=lambda merge: merge[:2])
    unknown = next((token for token, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    has_bytes = sum(kind == BYTE for kind in types) == 256
    if unknown is None and not has_bytes:
        raise CheckpointError(
            "the GGUF vocabulary has neither an unknown token nor all 256 byte tokens (token_type 2 and 6)"
        )
    core = Core(BPE(vocab, [pair for *_, pair in merges], unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes))
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = normalizers.Replace(" ", "▁")
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    core.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    _add_tokens(core, tokens, types)
    _add_ends(core, tokens, metadata, bos=True)
    return core


def _wordpiece(metadata: Mapping[str, Any]) -> Core:
    """BERT's WordPiece: GGUF marks the pieces that *begin* a word (``▁``), BERT those that continue one (``##``)."""
    stored, types = _field(metadata, "tokens", "bert"), _field(metadata, "token_type", "bert")
    plain = (UNKNOWN, CONTROL, USER_DEFINED)
    tokens = [
        token
        if kind in plain or (token[:1] == "[" and token[-1:] == "]")
        else token[1:]
        if token[:1] == "▁"
        else f"##{token}"
        for token, kind in zip(stored, types, strict=True)
    ]
    unknown = metadata.get("tokenizer.ggml.unknown_token_id")
    core = Core(WordPiece(_vocab(tokens), unk_token=tokens[int(unknown)] if unknown is not None else "[UNK]"))
    core.normalizer = normalizers.BertNormalizer(lowercase=True)
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece()
    _add_tokens(core, tokens, types)
    first, last = (
        int(metadata.get(f"tokenizer.ggml.{a}", metadata.get(f"tokenizer.ggml.{b}", -1)))
        for a, b in (("cls_token_id", "bos_token_id"), ("seperator_token_id", "eos_token_id"))
    )
    if first < 0 or last < 0:
        raise CheckpointError(
            "a GGUF tokenizer of kind 'bert' needs tokenizer.ggml.cls_token_id and seperator_token_id"
        )
    core.post_processor = processors.TemplateProcessing(
        single=[tokens[first], "$A", tokens[last]], special_tokens=[(tokens[first], first), (tokens[last], last)]
    )
    return core


def core_from_gguf(metadata: Mapping[str, Any]) -> Core:
    """Build the tokenizer that a GGUF file describes.

    Args:
        metadata: the file's fields by name.

    Raises:
        CheckpointError: a field is missing, or the kind of tokenizer or its word pattern is not known here.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        return _byte_level(metadata)
    if kind == "llama":
        return _sentencepiece(metadata)
    if kind == "bert":
        return _wordpiece(metadata)
    raise CheckpointError(
        f"the GGUF file holds a tokenizer of kind {kind!r} (tokenizer.ggml.model); known here are 'gpt2', 'llama' and "
        "'bert'. Put the model's tokenizer.json beside the file to use that instead"
    )
