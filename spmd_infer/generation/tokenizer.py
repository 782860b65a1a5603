"""Text to token ids and back, from a ``tokenizer.json`` or from the fields of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import msgspec
from tokenizers import Encoding
from tokenizers import Tokenizer as Core

from spmd_infer.errors import CheckpointError, TaskError
from spmd_infer.generation.chat import ChatTemplate
from spmd_infer.generation.detokenizer import ByteTable, Detokenizer, Kind
from spmd_infer.generation.tokenizer_gguf import core_from_gguf

_GGUF_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")


class TokenizerSource(Protocol):
    """The part of a checkpoint reader that a tokenizer needs."""

    @property
    def folder(self) -> Path:
        """Where the checkpoint's files lie."""

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Fields of a GGUF file; empty otherwise."""

    @property
    def config(self) -> Mapping[str, Any]:
        """The model's configuration in Hugging Face terms."""


class Tokenizer:
    """A model's tokenizer. Thread-safe: nothing changes after it is built.

    Args:
        core: the tokenizer proper; truncation and padding that it may carry are switched off.
        bos_id: the token that begins a text, if there is one.
        eos_ids: the tokens that end one.
        chat_template: the model's Jinja chat template, if it has one.
        chat_tokens: the special tokens that a chat template may name, such as ``bos_token``.
    """

    def __init__(
        self,
        core: Core,
        *,
        bos_id: int | None = None,
        eos_ids: frozenset[int] = frozenset(),
        chat_template: str | None = None,
        chat_tokens: Mapping[str, str] | None = None,
    ) -> None:
        core.no_truncation()
        core.no_padding()
        self._core = core
        self.bos_id = bos_id
        self.eos_ids = eos_ids
        self._chat_source = chat_template
        self._chat_tokens = dict(chat_tokens or {})

    @classmethod
    def from_reader(cls, reader: TokenizerSource) -> Tokenizer:
        """The tokenizer of a checkpoint: inside the GGUF file, or ``tokenizer.json`` beside the weights.

        Raises:
            CheckpointError: there is neither, or it is damaged or of an unknown kind.
        """
        beside = reader.folder / "tokenizer.json"
        if "tokenizer.ggml.model" in reader.metadata:
            try:
                return cls.from_gguf(reader.metadata)
            except CheckpointError:
                if not beside.is_file():
                    raise
        if beside.is_file():
            return cls.from_folder(reader.folder, reader.config)
        raise CheckpointError(f"no tokenizer: expected {beside}, or a GGUF file with tokenizer.ggml fields")

    @classmethod
    def from_folder(cls, folder: Path, config: Mapping[str, Any] | None = None) -> Tokenizer:
        """The tokenizer of a Hugging Face folder.

        Args:
            folder: holds ``tokenizer.json`` and, where the model has them, ``tokenizer_config.json``,
                ``generation_config.json`` and ``chat_template.jinja``.
            config: the model's ``config.json``; its end tokens count too.

        Raises:
            CheckpointError: a file is missing or damaged.
        """
        path = folder / "tokenizer.json"
        try:
            core = Core.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} is not a tokenizer that can be read: {error}") from error
        settings = _read_json(folder / "tokenizer_config.json")
        named = {name: _token_text(settings.get(name)) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        tokens = {name: text for name, text in named.items() if text is not None}
        generation = _read_json(folder / "generation_config.json")
        ends = [*_ids(generation.get("eos_token_id")), *_ids((config or {}).get("eos_token_id"))]
        named_end = core.token_to_id(tokens["eos_token"]) if "eos_token" in tokens else None
        begins = [*_ids(generation.get("bos_token_id")), *_ids((config or {}).get("bos_token_id"))]
        named_begin = core.token_to_id(tokens["bos_token"]) if "bos_token" in tokens else None
        return cls(
            core,
            bos_id=named_begin if named_begin is not None else next(iter(begins), None),
            eos_ids=frozenset([*ends, *([named_end] if named_end is not None else [])]),
            chat_template=_chat_source(folder, settings),
            chat_tokens=tokens,
        )

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """The tokenizer that the fields of a GGUF file describe.

        Raises:
            CheckpointError: a field is missing, or its kind or word pattern is unknown.
        """
        core = core_from_gguf(metadata)
        special: dict[str, int] = {}
        for name in ("bos", "eos", "unknown", "padding"):
            index = metadata.get(f"tokenizer.ggml.{name}_token_id")
            if index is not None:
                special[name] = int(index)
        texts = {name: core.id_to_token(index) for name, index in special.items()}
        ends = (metadata.get(f"tokenizer.ggml.{name}") for name in _GGUF_ENDS)
        template = metadata.get("tokenizer.chat_template")
        return cls(
            core,
            bos_id=special.get("bos"),
            eos_ids=frozenset(int(index) for index in ends if index is not None),
            chat_template=str(template) if template is not None else None,
            chat_tokens={f"{name}_token": text for name, text in texts.items() if text is not None},
        )

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included."""
        return self._core.get_vocab_size(with_added_tokens=True)

    def serialized(self) -> str:
        """The tokenizer as the text of a ``tokenizer.json``."""
        return str(self._core.to_str())

    def encode(self, text: str, add_special: bool = True, *, max_length: int | None = None) -> list[int]:
        """The ids of ``text``.

        Args:
            text: any text; the names of control tokens in it become those tokens.
            add_special: put the tokens around it that the model expects (``[CLS]`` … ``[SEP]``, a begin token).
            max_length: cut the text's own tokens so that no more than this many come out, special ones included.

        Raises:
            TaskError: ``max_length`` leaves no room for the text.
        """
        if max_length is None:
            return list(self._core.encode(text, add_special_tokens=add_special).ids)
        room = max_length - (self._core.num_special_tokens_to_add(False) if add_special else 0)
        if room < 1:
            raise TaskError(f"max_length {max_length} leaves no room for text beside the special tokens")
        encoding: Encoding = self._core.encode(text, add_special_tokens=False)
        encoding.truncate(room)
        return list(self._core.post_process(encoding, None, add_special).ids)

    def encode_batch(self, texts: Sequence[str], add_special: bool = True) -> list[list[int]]:
        """The ids of each text, encoded in parallel."""
        return [e.ids for e in self._core.encode_batch_fast(list(texts), add_special_tokens=add_special)]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD.

        Raises:
            TaskError: an id is not in the vocabulary.
        """
        if self._kind is None:
            return str(self._core.decode(list(ids), skip_special_tokens=skip_special))
        return self._table.decode(ids, skip_special=skip_special)

    def text_of(self, token: int) -> str:
        """The text of one token on its own; bytes that are no whole character are U+FFFD.

        Raises:
            TaskError: it is not in the vocabulary, or the vocabulary does not write text.
        """
        stream = self.stream(skip_special=False, at_start=False)
        return stream.push(token) + stream.flush()

    def stream(self, *, skip_special: bool = True, at_start: bool = True) -> Detokenizer:
        """A detokenizer for ids that come one by one.

        Args:
            skip_special: leave control tokens out of the text.
            at_start: False when the ids continue a text, so that the space before the first word is kept.

        Raises:
            TaskError: the vocabulary is of a kind that does not write text (BERT's).
        """
        if self._kind is None:
            raise TaskError(
                f"this tokenizer decodes by {self._decoder.get('type')}, which has no exact text; streaming needs a "
                "byte-level or SentencePiece vocabulary"
            )
        return Detokenizer(self._table, skip_special=skip_special, at_start=at_start)

    def chat(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True, **variables: Any) -> str:
        """The prompt that the model's chat template makes of a conversation.

        Args:
            messages: one mapping each, with ``role`` and ``content``.
            add_generation_prompt: open the assistant's turn at the end.
            **variables: further variables that the template knows.

        Raises:
            TaskError: the model has no chat template, or it refuses the conversation.
        """
        if self._template is None:
            raise TaskError("this model has no chat template; give it a plain prompt instead of messages")
        given = {**self._chat_tokens, **variables}
        return self._template.render(messages, add_generation_prompt=add_generation_prompt, variables=given)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate(self._chat_source) if self._chat_source is not None else None

    @cached_property
    def _decoder(self) -> dict[str, Any]:
        decoder = self._core.decoder
        state: dict[str, Any] = msgspec.json.decode(decoder.__getstate__()) if decoder is not None else {}
        return state

    @cached_property
    def _kind(self) -> Kind | None:
        steps = {step["type"] for step in self._decoder.get("decoders", [self._decoder]) if "type" in step}
        if "ByteLevel" in steps:
            return "byte-level"
        return "sentencepiece" if steps & {"ByteFallback", "Metaspace"} else None

    @cached_property
    def _table(self) -> ByteTable:
        if self._kind is None:
            raise TaskError("this vocabulary has no bytes")
        steps = self._decoder.get("decoders", [self._decoder])
        strips = any(
            step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )
        added = self._core.get_added_tokens_decoder()
        return ByteTable.build(
            self._core.get_vocab(with_added_tokens=True),
            self._kind,
            added={index: token.content for index, token in added.items()},
            special=[index for index, token in added.items() if token.special],
            strips_space=strips,
        )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is not a JSON object: {error}") from error


def _token_text(value: Any) -> str | None:
    """A special token in a tokenizer_config.json: its text, or an object that holds it."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _ids(value: Any) -> list[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        return [value]
    return [index for index in value if isinstance(index, int)] if isinstance(value, list) else []


def _chat_source(folder: Path, settings: Mapping[str, Any]) -> str | None:
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return beside.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    return template if isinstance(template, str) else None
