"""Token ids to text, one id at a time, never splitting a character.

A token is a run of *bytes*; a character may span several tokens. So decoding keeps a table of each token's bytes and
feeds them to an incremental UTF-8 decoder, which holds back an unfinished character until its last byte arrives.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from spmd_infer.errors import TaskError

Kind = Literal["byte-level", "sentencepiece"]
"""How a vocabulary writes bytes: GPT-2's printable stand-ins, or SentencePiece's ``▁`` and ``<0x0A>``."""

_SPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@cache
def _stand_ins() -> dict[str, int]:
    """GPT-2's printable character for each byte: itself where printable, else the next free one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(0x100 + index): byte for index, byte in enumerate(others)}


def _piece_bytes(piece: str, kind: Kind) -> bytes:
    if kind == "byte-level":
        stand_ins = _stand_ins()
        if all(char in stand_ins for char in piece):
            return bytes(stand_ins[char] for char in piece)
        return piece.encode()
    byte = _BYTE_PIECE.fullmatch(piece)
    return bytes([int(byte[1], 16)]) if byte else piece.replace(_SPACE, " ").encode()


@dataclass(frozen=True)
class ByteTable:
    """The bytes of every token of a vocabulary.

    Attributes:
        pieces: each id's bytes.
        special: ids of control tokens, which are left out of text unless asked for.
        strips_space: whether the vocabulary puts a space before a text, which is taken off again at its start.
    """

    pieces: Sequence[bytes]
    special: frozenset[int]
    strips_space: bool = False

    @classmethod
    def build(
        cls,
        vocab: Mapping[str, int],
        kind: Kind,
        *,
        added: Mapping[int, str],
        special: Collection[int],
        strips_space: bool = False,
    ) -> ByteTable:
        """The table of a vocabulary.

        Args:
            vocab: each token as the vocabulary writes it, and its id.
            kind: how the vocabulary writes bytes.
            added: tokens written as plain text, by id; they win over ``vocab``.
            special: ids of control tokens.
            strips_space: whether a text starts with a space that is not its own.
        """
        size = max([*vocab.values(), *added], default=-1) + 1
        pieces = [b""] * size
        for piece, index in vocab.items():
            pieces[index] = _piece_bytes(piece, kind)
        for index, text in added.items():
            pieces[index] = text.encode()
        return cls(pieces, frozenset(special), strips_space)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        stream = Detokenizer(self, skip_special=skip_special)
        return "".join([*map(stream.push, ids), stream.flush()])


class Detokenizer:
    """Turns ids into text as they come.

    Args:
        table: the bytes of each token.
        skip_special: leave control tokens out.
        at_start: whether the ids begin a text; False when they continue one, whose first token keeps its space.
    """

    def __init__(self, table: ByteTable, *, skip_special: bool = True, at_start: bool = True) -> None:
        self._table = table
        self._skip_special = skip_special
        self._strip = table.strips_space and at_start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes: empty while a character is unfinished.

        Raises:
            TaskError: the vocabulary has no such id.
        """
        if not 0 <= token_id < len(self._table.pieces):
            raise TaskError(
                f"token id {token_id} is not in the vocabulary, which has ids 0 to {len(self._table.pieces) - 1}"
            )
        if self._skip_special and token_id in self._table.special:
            return ""
        piece = self._table.pieces[token_id]
        if self._strip and piece:
            self._strip = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """What is left at the end: U+FFFD for an unfinished character, else nothing. Starts afresh afterwards."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest
