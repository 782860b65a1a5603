"""Tokenizers give the ids of the reference implementations, and text back exactly."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.errors import CheckpointError, TaskError
from spmd_infer.generation.chat import ChatTemplate
from spmd_infer.generation.detokenizer import ByteTable, Detokenizer
from spmd_infer.generation.tokenizer import Tokenizer

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "tokenizer_ids.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def smollm2_fields(smollm2: Path) -> dict[str, Any]:
    """The fields of SmolLM2's GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(smollm2).fields.items()}


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_fields: dict[str, Any]) -> Tokenizer:
    """SmolLM2's tokenizer, from its GGUF file."""
    return Tokenizer.from_gguf(smollm2_fields)


@pytest.fixture(scope="module")
def minilm_tokenizer(minilm: Path) -> Tokenizer:
    """MiniLM's tokenizer, from its tokenizer.json."""
    return Tokenizer.from_reader(SimpleNamespace(folder=minilm, metadata={}, config={}))


def pieces_fields() -> dict[str, Any]:
    """The small SentencePiece vocabulary of the fixture, as fields of a GGUF file."""
    fields = {f"tokenizer.ggml.{name}": value for name, value in FIXTURE["sentencepiece"]["fields"].items()}
    return fields | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_gguf_byte_level_ids(smollm2_tokenizer: Tokenizer) -> None:
    for text, ids in zip(FIXTURE["texts"], FIXTURE["smollm2"], strict=True):
        assert smollm2_tokenizer.encode(text) == ids, text


def test_gguf_special_tokens(smollm2_tokenizer: Tokenizer) -> None:
    assert (smollm2_tokenizer.bos_id, smollm2_tokenizer.eos_ids) == (1, frozenset({2}))
    assert smollm2_tokenizer.vocab_size == 49152
    assert smollm2_tokenizer.encode("<|im_start|>a") == [1, 81]


def test_gguf_byte_level_round_trip(smollm2_tokenizer: Tokenizer) -> None:
    for text in FIXTURE["texts"]:
        assert smollm2_tokenizer.decode(smollm2_tokenizer.encode(text), skip_special=False) == text


def test_decode_skips_special_tokens_unless_asked(smollm2_tokenizer: Tokenizer) -> None:
    ids = smollm2_tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert smollm2_tokenizer.decode(ids) == "user\nHi"
    assert smollm2_tokenizer.decode(ids, skip_special=False) == "<|im_start|>user\nHi<|im_end|>"


def test_decode_refuses_unknown_ids(smollm2_tokenizer: Tokenizer) -> None:
    with pytest.raises(TaskError, match="token id 49152 is not in the vocabulary, which has ids 0 to 49151"):
        smollm2_tokenizer.decode([49152])


def test_tokenizer_json_ids_are_neither_cut_nor_padded(minilm_tokenizer: Tokenizer) -> None:
    for text, ids in zip(FIXTURE["texts"], FIXTURE["minilm"], strict=True):
        assert minilm_tokenizer.encode(text) == ids, text
    assert len(minilm_tokenizer.encode("word " * 300)) == 302  # the file itself would cut at 128
    assert minilm_tokenizer.encode_batch(FIXTURE["texts"]) == FIXTURE["minilm"]


def test_max_length_keeps_the_special_tokens(minilm_tokenizer: Tokenizer) -> None:
    ids = minilm_tokenizer.encode("word " * 300, max_length=16)
    assert len(ids) == 16
    assert ids == [101, *[2773] * 14, 102]
    assert minilm_tokenizer.encode("a word", max_length=16) == minilm_tokenizer.encode("a word")
    with pytest.raises(TaskError, match="max_length 2 leaves no room"):
        minilm_tokenizer.encode("a word", max_length=2)


def test_wordpiece_cannot_stream(minilm_tokenizer: Tokenizer) -> None:
    with pytest.raises(TaskError, match="WordPiece"):
        minilm_tokenizer.stream()


def test_gguf_wordpiece_is_the_tokenizer_json(minilm: Path, minilm_tokenizer: Tokenizer) -> None:
    vocab = (minilm / "vocab.txt").read_text(encoding="utf-8").splitlines()
    special = {"[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"}
    stored = [
        t if t[:1] == "[" and t[-1:] == "]" else t.removeprefix("##") if t.startswith("##") else f"▁{t}" for t in vocab
    ]
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.tokens": stored,
        "tokenizer.ggml.token_type": [3 if t in special else 1 for t in vocab],
        "tokenizer.ggml.unknown_token_id": 100,
        "tokenizer.ggml.cls_token_id": 101,
        "tokenizer.ggml.seperator_token_id": 102,
    }
    tokenizer = Tokenizer.from_gguf(fields)
    assert tokenizer.encode_batch(FIXTURE["texts"]) == FIXTURE["minilm"]


def test_gguf_sentencepiece_ids() -> None:
    tokenizer = Tokenizer.from_gguf(pieces_fields())
    reference = FIXTURE["sentencepiece"]
    for text, ids in zip(reference["texts"], reference["ids"], strict=True):
        if not text:
            continue
        assert tokenizer.encode(text, add_special=False) == ids, text
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode([1, *ids, 2]) == text


def test_sentencepiece_stream_that_continues_keeps_its_space() -> None:
    tokenizer = Tokenizer.from_gguf(pieces_fields())
    ids = tokenizer.encode("the world", add_special=False)
    first, later = tokenizer.stream(), tokenizer.stream(at_start=False)
    assert "".join(map(first.push, ids)) == "the world"
    assert "".join(map(later.push, ids)) == " the world"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.pre": "martian"}, "pattern 'martian'.*known are .*smollm"),
        ({"tokenizer.ggml.merges": None}, "needs the field tokenizer.ggml.merges"),
        ({"tokenizer.ggml.model": "rwkv"}, "kind 'rwkv'"),
        ({"tokenizer.ggml.merges": ["ab"]}, "expected pairs like 'a b', found 'ab'"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "lists 2 tokens, but only 1 different"),
    ],
)
def test_damaged_gguf_fields(change: dict[str, Any], message: str) -> None:
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.token_type": [1, 1, 1],
        "tokenizer.ggml.merges": ["a b"],
    }
    assert Tokenizer.from_gguf(fields).encode("ab") == [2]
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.from_gguf(fields | change)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer: expected .*tokenizer\.json"):
        Tokenizer.from_reader(SimpleNamespace(folder=tmp_path, metadata={}, config={}))


def test_damaged_tokenizer_json(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is not a tokenizer that can be read"):
        Tokenizer.from_reader(SimpleNamespace(folder=tmp_path, metadata={}, config={}))


# A vocabulary in which every byte is one token, some characters are whole, and two ids are control tokens.
_WHOLE = [text.encode() for text in ("é", "🙂", "語 ", "ab")]
TABLE = ByteTable([*(bytes([b]) for b in range(256)), *_WHOLE, b"<s>", b"</s>"], frozenset({260, 261}))


def _pushed(stream: Detokenizer, ids: list[int]) -> str:
    return "".join([*map(stream.push, ids), stream.flush()])


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=12))
def test_stream_of_single_bytes_is_the_text(text: str) -> None:
    assert _pushed(Detokenizer(TABLE), list(text.encode())) == text


@given(st.lists(st.integers(0, 261), max_size=24), st.booleans())
def test_stream_is_the_lossy_decoding_of_all_bytes(ids: list[int], skip: bool) -> None:
    kept = [i for i in ids if not (skip and i in TABLE.special)]
    whole = b"".join(TABLE.pieces[i] for i in kept).decode("utf-8", "replace")
    assert _pushed(Detokenizer(TABLE, skip_special=skip), ids) == whole == TABLE.decode(ids, skip_special=skip)


@pytest.mark.parametrize("char", ["é", "語", "🙂"])
def test_no_split_of_a_character_shows(char: str) -> None:
    stream = Detokenizer(TABLE)
    data = f"a{char}b".encode()
    texts = [stream.push(byte) for byte in data]
    assert [t for t in texts if t] == ["a", char, "b"]
    unfinished = Detokenizer(TABLE)
    assert [unfinished.push(byte) for byte in char.encode()[:-1]] == [""] * (len(char.encode()) - 1)
    assert unfinished.flush() == "\ufffd"
    assert unfinished.push(ord("a")) == "a"  # nothing of it is left


@given(ids=st.lists(st.integers(0, 49151), max_size=20))
def test_stream_equals_decode_on_a_real_vocabulary(smollm2_tokenizer: Tokenizer, ids: list[int]) -> None:
    assert _pushed(smollm2_tokenizer.stream(), ids) == smollm2_tokenizer.decode(ids)
    theirs = smollm2_tokenizer._core.decode(ids, skip_special_tokens=True)
    assert smollm2_tokenizer.decode(ids) == theirs


def test_chat_template_of_the_model(smollm2_tokenizer: Tokenizer) -> None:
    prompt = smollm2_tokenizer.chat([{"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    closed = smollm2_tokenizer.chat([{"role": "system", "content": "Be short."}], add_generation_prompt=False)
    assert closed == "<|im_start|>system\nBe short.<|im_end|>\n"


def test_no_chat_template(minilm_tokenizer: Tokenizer) -> None:
    with pytest.raises(TaskError, match="no chat template"):
        minilm_tokenizer.chat([{"role": "user", "content": "Hi"}])


def _render(source: str, **variables: Any) -> str:
    messages = [{"role": "user", "content": "<b>"}, {"role": "assistant", "content": "b"}]
    return ChatTemplate(source).render(messages, add_generation_prompt=True, variables=variables)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ loop.index }}{{ loop.last }};{% endfor %}", "1False;2True;"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<b>"}, {"role": "assistant", "content": "b"}]'),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "<b>"\n}'),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}", "b"),
        ("{{ bos }}{{ messages[0]['content'] + 'x' ~ 'y' }}", "<s><b>xy"),
        ("{% set n = namespace(k=0) %}{% for m in messages %}{% set n.k = n.k + 1 %}{% endfor %}{{ n.k }}", "2"),
        ("{% if strftime_now('%Y') | int > 2000 %}\n  yes\n{% endif %}", "  yes\n"),
        ("{% macro f(x) %}[{{ x.strip() }}]{% endmacro %}{{ f(' a ') }}", "[a]"),
    ],
)
def test_what_templates_use(source: str, text: str) -> None:
    assert _render(source, bos="<s>") == text


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused the conversation: roles must alternate"),
        ("{% for %}", "cannot be read"),
        ("{{ messages.__class__.__mro__ }}", "refused"),
        ("{{ ''.__class__.mro() }}", "refused"),
        ("{{ messages.append(1) }}", "refused"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}", "steps|seconds"),
        (
            "{% set n = namespace(s='aaaa') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
            "characters",
        ),
        (
            "{% set n = namespace(s='aaaa') %}{% for i in range(99) %}{% set n.s = n.s + n.s %}{% endfor %}",
            "characters",
        ),
        ("{{ 'a' * 10 ** 10 }}", "repeated"),
        ("{{ 10 ** (10 ** 10) }}", "power"),
        ("{{ 'a'.center(10 ** 10) }}", "refused"),
        ("{{ '%10000000000d' % 1 }}", "formatted text with %"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "too deeply"),
        ("{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}", "steps|seconds"),
    ],
)
def test_templates_that_are_stopped(source: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        _render(source)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "that is empty"),
        ("hello", "expected a list of messages"),
        ([{"content": "a"}], "message 0 must be a mapping with a 'role'"),
        ([{"role": "user"}], "has no 'content'"),
    ],
)
def test_messages_that_are_malformed(messages: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        ChatTemplate("a").render(messages, add_generation_prompt=True, variables={})
