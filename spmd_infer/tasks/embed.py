"""Turn texts into vectors: ``engine.embed(texts)``."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import msgspec
import numpy as np
import numpy.typing as npt

from spmd_infer.axes import BATCH, EMBED, SEQ
from spmd_infer.errors import CheckpointError, TaskError
from spmd_infer.generation.tokenizer import Tokenizer
from spmd_infer.packing import ROW_LENS, Packing, pack
from spmd_infer.transfer import fetch

if TYPE_CHECKING:
    from spmd_infer.engine import Engine

Vectors = npt.NDArray[np.float32]
Pooling = Literal["mean", "first"]

# Slots of each device in a full batch: on a CPU few enough for its caches, elsewhere enough to keep it busy.
BATCH_TOKENS = {"cpu": 2048}
BATCH_TOKENS_ELSEWHERE = 16384
_IN_FLIGHT = 3
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class EmbedReport:
    """How one call went.

    Attributes:
        texts: how many texts were embedded.
        tokens: their tokens, special ones included.
        truncated: how many texts were longer than ``max_length`` and lost their ends.
        max_length: the most tokens of a text that count.
        row_len: tokens in a packed row.
        batches: how many batches were computed.
        fill: tokens over computed slots; the rest is padding.
        imbalance: tokens of the busiest data shard over the mean; 1 is perfect.
    """

    texts: int
    tokens: int
    truncated: int
    max_length: int
    row_len: int
    batches: int
    fill: float
    imbalance: float


class Embed:
    """Embeds texts with one engine.

    Args:
        engine: an engine whose model is an encoder loaded from a checkpoint with a tokenizer.

    Attributes:
        last_report: how the latest call went; None before the first.

    Raises:
        TaskError: the engine's model is no text encoder, or is part of a pipeline with steps that are not offered here.
        CheckpointError: the checkpoint has no tokenizer.
    """

    def __init__(self, engine: Engine) -> None:
        family, reader = engine.family, engine.reader
        if family is None or family.task != "embed" or reader is None:
            said = "a model of your own" if family is None else f"family {family.name!r}"
            raise TaskError(
                f"embed takes a text encoder loaded from a checkpoint, but the engine holds {said}; use engine.infer "
                "with token ids"
            )
        self._engine = engine
        self._tokenizer = Tokenizer.from_reader(reader)
        self._pooling = sentence_pooling(reader.folder)
        positions: int = engine.config.max_positions  # type: ignore[union-attr]  # every encoder's Config has it
        self.max_length = min(positions, sentence_length(reader.folder) or positions)
        platform = engine.mesh.devices.flat[0].platform
        self._batch_tokens = BATCH_TOKENS.get(platform, BATCH_TOKENS_ELSEWHERE)
        self._programs: dict[int, Callable[..., jax.Array]] = {}
        self.last_report: EmbedReport | None = None

    def __call__(self, texts: Sequence[str], *, normalize: bool = True, max_length: int | None = None) -> Vectors:
        """One vector for each text.

        Texts are packed into rows, several to a row, so that little is computed for padding and every data shard gets
        near-equal tokens. Texts that are too long lose their ends, with a warning that says how many.

        Args:
            texts: the texts, any number of them.
            normalize: scale each vector to length one.
            max_length: the most tokens of a text that count, special ones included; default and most is the length
                that the model was made for.

        Returns:
            Float32 ``[texts, width]`` in the order of ``texts``.

        Raises:
            TaskError: there are no texts, one is not a string, or ``max_length`` is out of range.
        """
        found = _checked(texts)
        limit = self._limit(max_length)
        ids, truncated = self._encode(found, limit)
        row_lens = [*ROW_LENS]
        while row_lens[-1] < limit:
            row_lens.append(row_lens[-1] * 2)
        packing = pack(
            [len(row) for row in ids],
            parts=self._engine.data_parts,
            row_lens=row_lens,
            batch_tokens=self._batch_tokens,
        )
        vectors = self._run(ids, packing)
        self.last_report = EmbedReport(
            texts=len(found),
            tokens=int(packing.shard_tokens.sum()),
            truncated=truncated,
            max_length=limit,
            row_len=packing.row_len,
            batches=len(packing.batches),
            fill=packing.fill,
            imbalance=packing.imbalance,
        )
        return _unit(vectors) if normalize else vectors

    def _limit(self, max_length: int | None) -> int:
        if max_length is None:
            return self.max_length
        if not 1 <= max_length <= self.max_length:
            raise TaskError(f"max_length {max_length} is out of range: this model takes 1 to {self.max_length} tokens")
        return max_length

    def _encode(self, texts: list[str], limit: int) -> tuple[list[list[int]], int]:
        ids = self._tokenizer.encode_batch(texts)
        long = [index for index, row in enumerate(ids) if len(row) > limit]
        if long:
            warnings.warn(
                f"{len(long)} of {len(texts)} texts have more than {limit} tokens and lose their ends; the first is "
                f"text {long[0]} with {len(ids[long[0]])} tokens",
                stacklevel=4,
            )
        for index in long:
            ids[index] = self._tokenizer.encode(texts[index], max_length=limit)
        return ids, len(long)

    def _run(self, ids: list[list[int]], packing: Packing) -> Vectors:
        program = self._program(packing.max_segments)
        result: Vectors | None = None
        waiting: deque[tuple[npt.NDArray[np.int64], int, jax.Array]] = deque()

        def collect(result: Vectors | None) -> Vectors:
            texts, first, pooled = waiting.popleft()
            rows = fetch(pooled)  # [rows, segments, D]
            if result is None:
                result = np.empty((len(ids), rows.shape[-1]), np.float32)
            result[texts] = rows[packing.rows[texts] - first, packing.segments[texts]]
            return result

        for texts, first, arrays in packed_batches(ids, packing):
            placed = [self._engine.place(array, (BATCH, SEQ)) for array in arrays]
            waiting.append((texts, first, program(*placed)))
            if len(waiting) == _IN_FLIGHT:
                result = collect(result)
        while waiting:
            result = collect(result)
        assert result is not None  # there is at least one text
        return result

    def _program(self, segments: int) -> Callable[..., jax.Array]:
        program = self._programs.get(segments)
        if program is None:
            pooling = self._pooling

            def embed(model: Any, *arrays: jax.Array) -> jax.Array:
                pooled: jax.Array = model.embed(*arrays, segments=segments, pooling=pooling)
                return pooled

            program = self._engine.jit(f"embed {segments}", embed, out_axes=(BATCH, None, EMBED))
            self._programs[segments] = program
        return program


def packed_batches(
    ids: Sequence[Sequence[int]], packing: Packing
) -> Iterator[tuple[npt.NDArray[np.int64], int, tuple[npt.NDArray[np.int32], ...]]]:
    """The arrays of each batch of a packing.

    Args:
        ids: token ids of each text.
        packing: where each text lies.

    Yields:
        The texts in the batch, its first row, and int32 ``[rows, row_len]`` arrays: token ids, each token's position in
        its text, and the segment of its row that it belongs to, from 1; all are 0 in padding.
    """
    by_row = np.argsort(packing.rows, kind="stable")
    sorted_rows = packing.rows[by_row]
    for first, count in packing.batches:
        texts = by_row[np.searchsorted(sorted_rows, first) : np.searchsorted(sorted_rows, first + count)]
        input_ids, position_ids, segment_ids = (np.zeros(count * packing.row_len, np.int32) for _ in range(3))
        if texts.size:
            lengths = np.array([len(ids[text]) for text in texts])
            positions = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            begin = (packing.rows[texts] - first) * packing.row_len + packing.starts[texts]
            slots = np.repeat(begin, lengths) + positions
            input_ids[slots] = np.concatenate([ids[text] for text in texts])
            position_ids[slots] = positions
            segment_ids[slots] = np.repeat(packing.segments[texts] + 1, lengths)
        shape = (count, packing.row_len)
        yield texts, first, tuple(array.reshape(shape) for array in (input_ids, position_ids, segment_ids))


def sentence_length(folder: Path) -> int | None:
    """The most tokens of a sentence that an encoder was made for, where its folder says so."""
    length = _read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    return length if isinstance(length, int) and length > 0 else None


def sentence_pooling(folder: Path) -> Pooling:
    """How an encoder's tokens become one vector; the mean where its folder does not say.

    Raises:
        TaskError: the folder asks for a pooling, or a further step, that is not offered here.
    """
    modules = _read_json(folder / "modules.json", list)
    for module in modules:
        kind = str(module.get("type", "") if isinstance(module, dict) else module).rpartition(".")[2]
        if kind not in _KNOWN_MODULES:
            raise TaskError(
                f"{folder} describes a pipeline with a step {kind!r}; embed offers {', '.join(_KNOWN_MODULES)}"
            )
    settings = _read_json(folder / "1_Pooling" / "config.json")
    chosen = sorted(key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True)
    if chosen in ([], ["pooling_mode_mean_tokens"]):
        return "mean"
    if chosen == ["pooling_mode_cls_token"]:
        return "first"
    raise TaskError(f"{folder} pools tokens by {', '.join(chosen)}; embed offers the mean or the first token")


def _read_json(path: Path, kind: type[Any] = dict) -> Any:
    if not path.is_file():
        return kind()
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path} is not a JSON {kind.__name__}: {error}") from error


def _checked(texts: Sequence[str]) -> list[str]:
    if isinstance(texts, str | bytes):
        raise TaskError(f"embed takes a list of texts, but got one {type(texts).__name__}: write [text]")
    found = list(texts)
    if not found:
        raise TaskError("embed got no texts; give at least one")
    for index, text in enumerate(found):
        if not isinstance(text, str):
            raise TaskError(f"text {index} is a {type(text).__name__}, expected a str")
    return found


def _unit(vectors: Vectors) -> Vectors:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit: Vectors = vectors / np.maximum(lengths, np.finfo(np.float32).tiny)
    return unit
