"""What a PyTorch state dict says, read from its pickle without running anything of it.

A pickle is a program for a stack machine. This walks its opcodes with ``pickletools.genops``, which only decodes, and
knows just the few that state dicts are made of; the only names a pickle may refer to are those listed here, and each
stands for a record of ours, never for an import. Anything else ends the reading with an error that names it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol, cast

import numpy as np

from spmd_infer.checkpoints.torch_records import (
    ALLOWED,
    ORDERED,
    REBUILD,
    REBUILD_PARAMETER,
    REBUILD_V2,
    REBUILD_V3,
    SIZE,
    STORAGE_DTYPES,
    TORCH_DTYPES,
    Name,
    Storage,
    TensorRecord,
)
from spmd_infer.errors import CheckpointError

# What decoding and walking a damaged pickle raises; a deprecation warning where the program makes errors of them.
_DAMAGE = (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError, DeprecationWarning)
_MOST_OPCODES = 4_000_000  # some 36 a tensor


class Stream(Protocol):
    """What opcodes are read from; reads are bounded by the file's size."""

    def read(self, count: int, /) -> bytes:
        """Up to ``count`` bytes."""
        ...

    def readline(self) -> bytes:
        """Up to and with the next line end."""
        ...

    def tell(self) -> int:
        """How many bytes have been read."""
        ...


@dataclass
class _Ordered:
    """A ``collections.OrderedDict``, on which BUILD may set attributes (module versions), which are dropped."""

    items: dict[Any, Any]


_LITERALS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTIES: Mapping[str, Callable[[], Any]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_INTEGERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_FLOATS = {"FLOAT", "BINFLOAT"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
_CONSTANTS = frozenset(_INTEGERS | _FLOATS | _TEXTS | _BYTES)
_IGNORED = frozenset({"PROTO", "FRAME"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_SHORT_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(stream: Stream, path: Path) -> Any:
    """The value of one pickle, with tensors as ``TensorRecord``.

    Args:
        stream: read up to and with the pickle's STOP.
        path: the file, for errors.

    Returns:
        Dicts (``OrderedDict`` as dict), lists, tuples, numbers, strings and tensor records.

    Raises:
        CheckpointError: the pickle is damaged, or holds an opcode or name that a state dict of tensors has no use for.
    """
    machine = _Machine(path)
    try:
        for count, (opcode, argument, position) in enumerate(pickletools.genops(cast("IO[bytes]", stream))):
            if opcode.name == "STOP":
                return _plain(machine.pop())
            if count > _MOST_OPCODES:
                raise CheckpointError(f"{path}: its pickle has more than {_MOST_OPCODES} opcodes")
            machine.step(opcode.name, argument, position)
    except CheckpointError:
        raise
    except _DAMAGE as error:
        raise CheckpointError(f"{path}: its pickle is damaged: {type(error).__name__}: {error}") from error
    raise CheckpointError(f"{path}: its pickle has no end")


class _Machine:
    """The stack, the marks and the memo of one pickle."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def refuse(self, what: str, position: int | None) -> CheckpointError:
        where = "" if position is None else f" (opcode at byte {position})"
        return CheckpointError(
            f"{self._path}: its pickle {what}{where}; only state dicts of tensors are read, and nothing is executed. "
            f"Save the model's state_dict(), or convert the file to safetensors"
        )

    def pop(self) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0):
            raise ValueError("an opcode takes more values than there are")
        return self._stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def top(self, kind: type | tuple[type, ...], opcode: str) -> Any:
        if len(self._stack) <= (self._marks[-1] if self._marks else 0) or not isinstance(self._stack[-1], kind):
            raise ValueError(f"{opcode} finds the wrong kind of value on the stack")
        return self._stack[-1]

    def step(self, opcode: str, argument: Any, position: int | None) -> None:
        """Carry out one opcode."""
        if opcode in _CONSTANTS:
            self._stack.append(argument)
        elif opcode in _PUTS:
            self._memo[int(argument)] = self.top(object, opcode)
        elif opcode in _GETS:
            self._stack.append(self._memo[int(argument)])
        elif opcode == "MEMOIZE":
            self._memo[len(self._memo)] = self.top(object, opcode)
        elif opcode in _LITERALS:
            self._stack.append(_LITERALS[opcode])
        elif opcode in _EMPTIES:
            self._stack.append(_EMPTIES[opcode]())
        elif opcode == "MARK":
            self._marks.append(len(self._stack))
        elif opcode == "POP":
            self.pop()
        elif opcode == "POP_MARK":
            self.pop_to_mark()
        elif opcode not in _IGNORED:
            self._step_rare(opcode, argument, position)

    def _step_rare(self, opcode: str, argument: Any, position: int | None) -> None:
        if opcode in _SHORT_TUPLES:
            items = [self.pop() for _ in range(_SHORT_TUPLES[opcode])]
            self._stack.append(tuple(reversed(items)))
        elif opcode == "TUPLE":
            self._stack.append(tuple(self.pop_to_mark()))
        elif opcode == "LIST":
            self._stack.append(self.pop_to_mark())
        elif opcode == "DICT":
            items = self.pop_to_mark()
            self._stack.append({})
            self._set_items(items)
        elif opcode == "APPEND":
            item = self.pop()
            self.top(list, opcode).append(item)
        elif opcode == "APPENDS":
            items = self.pop_to_mark()
            self.top(list, opcode).extend(items)
        elif opcode == "SETITEM":
            value = self.pop()
            self._set_items([self.pop(), value])
        elif opcode == "SETITEMS":
            self._set_items(self.pop_to_mark())
        elif opcode == "GLOBAL":
            module, _, name = argument.partition(" ")
            self._push_name(module, name, position)
        elif opcode == "STACK_GLOBAL":
            name, module = self.pop(), self.pop()
            self._push_name(module, name, position)
        elif opcode == "BINPERSID":
            self._stack.append(self._storage(self.pop(), position))
        elif opcode == "REDUCE":
            arguments = self.pop()
            self._stack.append(self._reduce(self.pop(), arguments, position))
        elif opcode == "BUILD":
            self.pop()
            if not isinstance(self._stack[-1], _Ordered):
                raise self.refuse("sets the state of an object (BUILD) that is not an OrderedDict", position)
        else:
            raise self.refuse(f"uses opcode {opcode}", position)

    def _set_items(self, flat: list[Any]) -> None:
        target = self.top((dict, _Ordered), "SETITEMS")
        items = target.items if isinstance(target, _Ordered) else target
        if len(flat) % 2:
            raise ValueError("a dict is given a key without a value")
        for key, value in zip(flat[::2], flat[1::2], strict=True):
            if not isinstance(key, str | int | float | bytes):
                # Keys of other kinds (nested tuples) can be made to take forever to hash.
                raise ValueError(f"a dict has a key of type {type(key).__name__}")
            items[key] = value

    def _push_name(self, module: Any, name: Any, position: int | None) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.refuse("refers to a global that is not named by strings", position)
        wanted = Name(module, name)
        if wanted not in ALLOWED:
            raise self.refuse(f"refers to {str(wanted)[:200]!r}, which is not on the list of what is read", position)
        self._stack.append(wanted)

    def _storage(self, record: Any, position: int | None) -> Storage:
        if not isinstance(record, tuple) or len(record) not in (5, 6) or record[0] != "storage":
            raise self.refuse("has a persistent id that is not a tensor's storage", position)
        _, kind, key, _location, size = record[:5]
        if not isinstance(kind, Name) or kind.name not in STORAGE_DTYPES:
            raise self.refuse(f"has a storage of unknown type {kind!s:.100}", position)
        if not isinstance(key, str) or not _is_count(size):
            raise ValueError("a storage has no key or no size")
        view = record[5] if len(record) == 6 else None
        view_of = None
        if view is not None:
            if not isinstance(view, tuple) or len(view) != 3 or not all(map(_is_count, view[1:])):
                raise ValueError("a storage is a view without offset and size")
            view_of = (view[1], view[2])
            if view[1] + view[2] > size:
                raise ValueError(f"a view of {view[2]} elements from {view[1]} on leaves its storage of {size}")
        dtype = STORAGE_DTYPES[kind.name]
        return Storage(key, None if dtype is None else np.dtype(dtype), size, kind.name, view_of)

    def _reduce(self, called: Any, arguments: Any, position: int | None) -> Any:
        if not isinstance(called, Name) or not isinstance(arguments, tuple):
            raise self.refuse("calls something that is not a named function (REDUCE)", position)
        if called == ORDERED:
            return _ordered(arguments)
        if called == REBUILD_PARAMETER:
            if not arguments or not isinstance(arguments[0], TensorRecord):
                raise ValueError("a parameter is made of something that is not a tensor")
            return arguments[0]
        if called == SIZE:
            (sizes,) = arguments
            return tuple(sizes)
        if called in (REBUILD, REBUILD_V2):
            return _tensor(arguments[0], arguments[0].dtype, *arguments[1:4])
        if called == REBUILD_V3:
            dtype = arguments[6]
            if not isinstance(dtype, Name) or dtype.name not in TORCH_DTYPES:
                raise ValueError("a tensor has an unknown dtype")
            return _tensor(arguments[0], np.dtype(TORCH_DTYPES[dtype.name]), *arguments[1:4])
        raise self.refuse(f"calls {called} (REDUCE)", position)


def _ordered(arguments: tuple[Any, ...]) -> _Ordered:
    pairs = arguments[0] if arguments else []
    if len(arguments) > 1 or not isinstance(pairs, list | tuple):
        raise ValueError("an OrderedDict is made of something that is not a list of pairs")
    result = _Ordered({})
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise ValueError(f"an OrderedDict has a key of type {type(key).__name__}")
        result.items[key] = value
    return result


def _tensor(storage: Any, dtype: np.dtype[Any] | None, offset: Any, shape: Any, strides: Any) -> TensorRecord:
    if not isinstance(storage, Storage) or dtype is None:
        raise ValueError("a tensor is made of something that is not a typed storage")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or len(shape) != len(strides):
        raise ValueError("a tensor's shape and strides do not belong together")
    if not _is_count(offset) or not all(map(_is_count, (*shape, *strides))):
        raise ValueError(f"a tensor has offset {offset!s:.40}, shape {shape!s:.80} and strides {strides!s:.80}")
    return TensorRecord(storage, dtype, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _plain(value: Any) -> Any:
    return value.items if isinstance(value, _Ordered) else value


def entries(value: Any) -> Mapping[Any, Any] | None:
    """The items of a dict or OrderedDict of a pickle; None for anything else."""
    plain = _plain(value)
    return plain if isinstance(plain, dict) else None
