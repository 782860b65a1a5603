"""Structured output: every walk under the masks ends in text of the shape, and what is wrong fails alone."""

import json
import re
import threading
import time
from typing import Any

import jsonschema
import numpy as np
import pytest

from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.errors import TaskError
from spmd_infer.generation.bad_words import bad_word_ids
from spmd_infer.generation.constraints import Constraint, ConstraintCompiler, fill_masks
from spmd_infer.generation.structured_outputs import StructuredOutputs
from spmd_infer.generation.token_state import token_bits
from spmd_infer.generation.tokenizer import Tokenizer
from tests.generation.test_tokenizer import pieces_fields

VOCAB = 49_152
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "é"]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TAGGED = {
    "type": "object",
    "properties": {"kind": {"const": "n"}, "n": {"type": "number"}},
    "required": ["kind", "n"],
    "additionalProperties": False,
}
STAMPED = {
    "type": "object",
    "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "on": {"type": "string", "format": "date"},
    },
    "required": ["id", "on"],
    "additionalProperties": False,
}
PEOPLE = {
    "type": "object",
    "properties": {"people": {"type": "array", "items": PERSON, "minItems": 1, "maxItems": 2}},
    "required": ["people"],
    "additionalProperties": False,
}
NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
FLAGS = {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 4}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "choice of kinds": {"anyOf": [TAGGED, FLAGS, {"type": "null"}]},
    "pattern": STAMPED,
    "nested": PEOPLE,
    "tree": {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
}


@pytest.fixture(scope="module")
def tokenizer(smollm2: Any) -> Tokenizer:
    return Tokenizer.from_reader(open_checkpoint(smollm2))


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> ConstraintCompiler:
    return ConstraintCompiler(tokenizer, VOCAB)


def unpacked(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def walk(constraint: Constraint, rng: np.random.Generator, most: int = 2000) -> list[int]:
    """Tokens drawn evenly from those allowed, as a model that knows nothing would; end tokens are left out."""
    mask = np.empty(VOCAB // 32, np.uint32)
    tokens: list[int] = []
    while not constraint.is_finished and len(tokens) < most:
        constraint.fill(mask)
        allowed = unpacked(mask)
        token = int(rng.choice(allowed))
        constraint.advance(token)
        if token == 2:
            break
        tokens.append(token)
    return tokens


@pytest.mark.parametrize("name", SCHEMAS)
def test_json_walks_are_valid(compiler: ConstraintCompiler, tokenizer: Tokenizer, name: str) -> None:
    """A hundred walks for each of five schemas: 500 of 500 parse and validate."""
    rng = np.random.default_rng(len(name))
    validator = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.FormatChecker())
    texts = set()
    for _ in range(100):
        text = tokenizer.decode(walk(compiler.compile(StructuredOutputs(json=SCHEMAS[name])), rng))
        validator.validate(json.loads(text))
        texts.add(text)
    assert len(texts) > 50


def test_any_object(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(StructuredOutputs(json_object=True))
    text = '{"a": [1, {"b": null}],\n  "c": "ü"}'
    for token in tokenizer.encode(text, add_special=False):
        constraint.advance(token)
    assert constraint.is_accepting
    listing = compiler.compile(StructuredOutputs(json_object=True))
    with pytest.raises(TaskError, match="is not allowed after 0 tokens"):
        listing.advance(tokenizer.encode("[", add_special=False)[0])


@pytest.mark.parametrize(
    "pattern", [r"[a-f]{3}-[0-9]{2,4}", r"(yes|no|maybe)!?", r"[^\x00-\x7f]{1,3}", r"\p{Lu}\p{Ll}{0,5}"]
)
def test_regex_walks_match(compiler: ConstraintCompiler, tokenizer: Tokenizer, pattern: str) -> None:
    rng = np.random.default_rng(0)
    shape = StructuredOutputs(regex=pattern)
    python = pattern.replace(r"\p{Lu}", "[^\\W\\d_]").replace(r"\p{Ll}", "[^\\W\\d_]")
    texts = {tokenizer.decode(walk(compiler.compile(shape), rng)) for _ in range(40)}
    assert len(texts) > 3
    for text in texts:
        assert re.fullmatch(python, text), text


def test_every_choice_and_nothing_else(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    choices = ("red", "red wine", "blau/grün", 'say "hi"\n', "🙂")
    rng = np.random.default_rng(0)
    shape = StructuredOutputs(choice=choices)
    texts = {tokenizer.decode(walk(compiler.compile(shape), rng)) for _ in range(120)}
    assert texts == set(choices)


@pytest.mark.parametrize("grammar", ['start: "a" start "b" | "c"', 'root ::= "a" root "b" | "c"'])
def test_grammars_of_both_notations(compiler: ConstraintCompiler, tokenizer: Tokenizer, grammar: str) -> None:
    rng = np.random.default_rng(0)
    texts = {tokenizer.decode(walk(compiler.compile(StructuredOutputs(grammar=grammar)), rng)) for _ in range(30)}
    assert len(texts) > 2
    for text in texts:
        depth = text.index("c")
        assert text == "a" * depth + "c" + "b" * depth


def test_the_end(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    """End tokens are allowed where the text may end, alone where it must; and taking them back works."""
    mask = np.empty(VOCAB // 32, np.uint32)
    constraint = compiler.compile(StructuredOutputs(regex="ab?"))
    a, b = (tokenizer.encode(text, add_special=False)[0] for text in "ab")
    constraint.fill(mask)
    assert not constraint.is_accepting
    assert 2 not in unpacked(mask)
    constraint.advance(a)
    constraint.fill(mask)
    assert constraint.is_accepting
    assert not constraint.is_finished
    assert set(unpacked(mask)) == {2, b}
    before_end = mask.copy()
    constraint.advance(2)
    assert constraint.is_finished
    constraint.rollback(1)
    constraint.fill(mask)
    assert (mask == before_end).all()
    constraint.advance(b)
    assert constraint.is_finished
    constraint.fill(mask)
    assert unpacked(mask).tolist() == [2]
    assert constraint.allowed([2, a]) == 1
    constraint.advance(2)
    constraint.rollback(2)
    constraint.fill(mask)
    assert (mask == before_end).all()
    with pytest.raises(TaskError, match="cannot take back 2 tokens of 1"):
        constraint.rollback(2)
    with pytest.raises(TaskError, match="token 5 is not allowed after 1 tokens"):
        constraint.advance(5)


def test_rollback_equals_never_having_gone(compiler: ConstraintCompiler) -> None:
    rng = np.random.default_rng(1)
    shape = StructuredOutputs(json=SCHEMAS["nested"])
    mask, expected = np.empty(VOCAB // 32, np.uint32), np.empty(VOCAB // 32, np.uint32)
    tokens = walk(compiler.compile(shape), rng)
    kept = len(tokens) // 2
    constraint, straight = compiler.compile(shape), compiler.compile(shape)
    for token in tokens[:kept]:
        straight.advance(token)
    straight.fill(expected)
    for token in tokens:
        constraint.advance(token)
    constraint.rollback(len(tokens) - kept)
    constraint.fill(mask)
    assert (mask == expected).all()
    assert constraint.allowed(tokens[kept:]) == len(tokens) - kept
    fork = constraint.fork()
    fork.advance(tokens[kept])
    constraint.fill(mask)
    assert (mask == expected).all()
    fork.rollback(1)
    fork.fill(mask)
    assert (mask == expected).all()


def test_forced_tokens(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    """Where the shape leaves no choice, tokens come without a model, as the tokenizer would write the text."""
    shape = StructuredOutputs(regex="The capital of France is Paris, and that of Italy is (Rome|Milan)\\.")
    constraint = compiler.compile(shape)
    forced = constraint.forced_tokens()
    written = tokenizer.encode("The capital of France is Paris, and that of Italy is", add_special=False)
    assert forced[:12] == written[:12]
    assert constraint.allowed(forced) == len(forced)
    for token in forced:
        constraint.advance(token)
    rest = tokenizer.encode(" Rome.", add_special=False)
    for token in rest:
        constraint.advance(token)
    assert constraint.is_finished
    assert constraint.forced_tokens() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"regex": "(unclosed"}, "regex cannot be used: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"(a)\1"}, "backreferences are not supported"),
        ({"regex": "[^\\x{0}-\\x{10ffff}]"}, "cannot be used"),
        ({"json": {"type": "strin"}}, "json cannot be used: Invalid type: strin"),
        ({"json": {"type": "object", "if": {"type": "string"}}}, "Unimplemented keys"),
        ({"json": {"$ref": "#"}}, "json cannot be used"),
        ({"json": {"$ref": "http://example.com/x.json"}}, "does not fetch resources"),
        ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "cannot be used"),
        ({"grammar": "start: foo"}, 'unknown name: "foo"'),
        ({"grammar": "((("}, "grammar cannot be used"),
        ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, "grammar cannot be used"),
    ],
)
def test_wrong_shapes(compiler: ConstraintCompiler, values: dict[str, Any], message: str) -> None:
    for _ in range(2):  # a failure is not kept
        with pytest.raises(TaskError, match=message):
            compiler.compile(StructuredOutputs(**values))


TWICE = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}
HEAVY: dict[str, dict[str, Any]] = {
    "nested repeats": {"regex": "((a{1,500}){1,500}){1,500}"},
    "many states": {"regex": ".*a.{400}"},
    "backtracking": {"regex": "(x+x+)+y"},
    "long strings": {"json": {"type": "string", "maxLength": 10_000_000}},
    "many items": {"json": {"type": "array", "items": PERSON, "minItems": 100_000}},
    "ambiguous": {"grammar": 'start: x x x x x x x x\nx: x x | "a" | ""'},
    "exploding": {"json": {"allOf": [{"anyOf": [{"minLength": i}, {"maxLength": 90 - i}]} for i in range(40)]}},
    "doubling": {"json": {"$defs": TWICE | {"d30": {"type": "null"}}, "$ref": "#/$defs/d0"}},
}


@pytest.mark.parametrize("name", HEAVY)
def test_heavy_shapes_are_bounded(compiler: ConstraintCompiler, name: str) -> None:
    """Refused or run, never for long: the library's own limits hold."""
    begin = time.monotonic()
    try:
        tokens = walk(compiler.compile(StructuredOutputs(**HEAVY[name])), np.random.default_rng(0), most=30)
    except TaskError:
        tokens = []
    assert time.monotonic() - begin < 10
    assert len(tokens) <= 30


def test_a_slow_compilation_fails_its_request_only(tokenizer: Tokenizer) -> None:
    slow = ConstraintCompiler(tokenizer, VOCAB, timeout_s=0.05)
    gate = threading.Event()
    compile_now = slow._compile

    def late(kind: str, source: str, compact: bool) -> Any:
        if source == "late":
            gate.wait(20)
        return compile_now(kind, source, compact)

    slow._compile = late  # type: ignore[method-assign]  # stands for a schema that takes long
    try:
        with pytest.raises(TaskError, match=r"regex was not compiled within 0\.05 s"):
            slow.compile(StructuredOutputs(regex="late"))
        slow._timeout_s = 20
        assert slow.compile(StructuredOutputs(regex="fast")).is_accepting is False
    finally:
        gate.set()
        slow.close()


def test_cache_is_bounded_and_shared(tokenizer: Tokenizer) -> None:
    small = ConstraintCompiler(tokenizer, VOCAB, cached=2)
    for pattern in ("a", "b", "a", "c"):
        small.compile(StructuredOutputs(regex=pattern))
    assert [source for _, source, _ in small._compiled] == ["a", "c"]
    results: list[Constraint] = []
    threads = [
        threading.Thread(target=lambda: results.append(small.compile(StructuredOutputs(regex="z{3}"))))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    z = tokenizer.encode("z", add_special=False)[0]
    for constraint in results:  # each goes its own way
        constraint.advance(z)
        assert not constraint.is_finished
    assert len(results) == 8
    small.close()


def test_batches_of_masks(compiler: ConstraintCompiler, tokenizer: Tokenizer) -> None:
    digit, free = compiler.compile(StructuredOutputs(regex="[0-9]")), token_bits([5, 40_000], VOCAB)
    masks = np.zeros((3, VOCAB // 32), np.uint32)
    assert fill_masks(masks, [digit, None, free]) == {}
    assert {tokenizer.decode([token]) for token in unpacked(masks[0]).tolist()} == set("0123456789")
    assert (masks[1] == 0xFFFFFFFF).all()
    assert unpacked(masks[2]).tolist() == [5, 40_000]
    with pytest.raises(TaskError, match="not allowed"):
        digit.advance(5)
    failures = fill_masks(masks, [None, digit, free])
    assert list(failures) == [1]
    assert "structured output failed" in str(failures[1])
    assert (masks[1] == 0xFFFFFFFF).all()
    with pytest.raises(TaskError, match="a mask must be 1536 contiguous uint32"):
        compiler.compile(StructuredOutputs(regex="[0-9]")).fill(np.zeros(7, np.uint32))


def test_logits_may_be_wider_than_the_vocabulary(tokenizer: Tokenizer) -> None:
    wide = ConstraintCompiler(tokenizer, VOCAB + 40)
    mask = np.empty(VOCAB // 32 + 2, np.uint32)
    wide.compile(StructuredOutputs(regex=".*")).fill(mask)
    assert unpacked(mask).max() < VOCAB
    wide.close()


def test_a_sentencepiece_vocabulary() -> None:
    """Bytes written as <0xC3> and spaces as ▁, from the fields of a GGUF file."""
    tokenizer = Tokenizer.from_gguf(pieces_fields())
    small = ConstraintCompiler(tokenizer, tokenizer.vocab_size)
    mask = np.empty(-(-tokenizer.vocab_size // 32), np.uint32)
    for seed in range(20):
        constraint = small.compile(StructuredOutputs(regex=" ?[a-z ]{2,9}é🙂"))
        stream, text, rng = tokenizer.stream(at_start=False), "", np.random.default_rng(seed)
        while not constraint.is_finished:
            constraint.fill(mask)
            token = int(rng.choice(unpacked(mask)))
            constraint.advance(token)
            text += stream.push(token)
        assert re.fullmatch(" ?[a-z ]{2,9}é🙂", text + stream.flush()), text
    small.close()


def test_a_tokenizer_without_end_tokens(tokenizer: Tokenizer) -> None:
    with pytest.raises(TaskError, match="need a model with an end token"):
        ConstraintCompiler(Tokenizer(tokenizer._core), VOCAB)


def test_bad_words_as_tokens(tokenizer: Tokenizer) -> None:
    found = bad_word_ids(["darn", "New York"], tokenizer, VOCAB)
    assert {tokenizer.decode(ids) for ids in found} == {"darn", " darn", "New York", " New York"}
    assert any(len(ids) > 1 for ids in found)
    with pytest.raises(TaskError, match=r"bad_words: .* has \d+ tokens; the most is 8"):
        bad_word_ids(["zqxjkvbw" * 4], tokenizer, VOCAB)
    with pytest.raises(TaskError, match=r"bad_words: 'darn' has token \d+; the vocabulary has 100"):
        bad_word_ids(["darn"], tokenizer, 100)
