"""Damaged and hostile PyTorch files: nothing is ever run, and each gives a CheckpointError that names the file.

The pickles are put together opcode by opcode; no pickle is made or loaded with Python's own module.
"""

import io
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spmd_infer.checkpoints import open_checkpoint
from spmd_infer.checkpoints.torch_containers import LEGACY_MAGIC
from tests.checkpoints import malformed

FILES = Path(__file__).parents[1] / "fixtures" / "torch_files"
GIANT = 1 << 60

# A small assembler of pickle opcodes.
PROTO, MARK, STOP, DICT, TUPLE, EMPTY_TUPLE, LIST = b"\x80\x02", b"(", b".", b"}", b"t", b")", b"]"
REDUCE, BUILD, PERSID, SETITEM, SETITEMS, NONE, FALSE, STACK_GLOBAL = (
    b"R",
    b"b",
    b"Q",
    b"s",
    b"u",
    b"N",
    b"\x89",
    b"\x93",
)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(module: str, attribute: str) -> bytes:
    return b"c" + f"{module}\n{attribute}\n".encode()


def group(*items: bytes) -> bytes:
    return MARK + b"".join(items) + TUPLE


def storage(kind: str = "FloatStorage", key: bytes = text("0"), size: int = 6) -> bytes:
    return group(text("storage"), name("torch", kind), key, text("cpu"), number(size)) + PERSID


def tensor(
    place: bytes | None = None,
    offset: bytes = number(0),
    shape: tuple[int, ...] = (2, 3),
    strides: tuple[int, ...] = (3, 1),
    rebuild: bytes = name("torch._utils", "_rebuild_tensor_v2"),
) -> bytes:
    view = [offset, group(*map(number, shape)), group(*map(number, strides))]
    hooks = name("collections", "OrderedDict") + EMPTY_TUPLE + REDUCE
    return rebuild + group(storage() if place is None else place, *view, FALSE, hooks) + REDUCE


def state(*items: bytes) -> bytes:
    return PROTO + DICT + MARK + b"".join(items) + SETITEMS + STOP


SOUND = state(text("w"), tensor())


def archive(pickle: bytes = SOUND, storages: dict[str, bytes] | None = None, **others: bytes) -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as out:
        out.writestr("archive/data.pkl", pickle)
        out.writestr("archive/byteorder", others.pop("byteorder", b"little"))
        for key, content in (storages or {"0": bytes(24)}).items():
            out.writestr(f"archive/data/{key}", content)
        for key, content in others.items():
            out.writestr(f"archive/{key}", content)
    return target.getvalue()


def legacy(
    value: bytes = SOUND,
    keys: bytes = PROTO + LIST + text("0") + b"a" + STOP,
    data: bytes = struct.pack("<q", 6) + bytes(24),
    version: int = 1001,
    little: bytes = b"\x88",
) -> bytes:
    system = PROTO + DICT + text("little_endian") + little + SETITEM + STOP
    return LEGACY_MAGIC + PROTO + number(version) + STOP + system + value + keys + data


def ran(*_: object) -> None:
    """What a hostile pickle would call to show that it could."""
    raise AssertionError("a pickle was executed")


CALL = group(text("touch /tmp/pickle_was_executed")) + REDUCE
OS_SYSTEM = name("os", "system") + CALL
REBUILD_LATER = text("torch._utils") + text("_rebuild_tensor_v2") + STACK_GLOBAL

ATTACKS: dict[str, bytes] = {
    "os.system": PROTO + OS_SYSTEM + STOP,
    "posix.system": PROTO + name("posix", "system") + CALL + STOP,
    "builtins.eval": PROTO + name("builtins", "eval") + CALL + STOP,
    "builtins.exec": PROTO + name("builtins", "exec") + CALL + STOP,
    "builtins.getattr": PROTO + name("builtins", "getattr") + group(name("collections", "OrderedDict"), text("x")),
    "importlib": PROTO + name("importlib", "import_module") + CALL + STOP,
    "subprocess": PROTO + name("subprocess", "Popen") + CALL + STOP,
    "torch.load": PROTO + name("torch", "load") + CALL + STOP,
    "torch.jit": PROTO + name("torch.jit", "load") + CALL + STOP,
    "dotted name": PROTO + name("collections", "OrderedDict.__class__") + CALL + STOP,
    "module with a space": PROTO + b"ccollections abc\nOrderedDict\n" + STOP,
    "a test's function": PROTO + name(__name__, "ran") + EMPTY_TUPLE + REDUCE + STOP,
    "inside a state dict": state(text("w"), tensor(), text("x"), OS_SYSTEM),
    "as a dict's key": state(OS_SYSTEM, tensor()),
    "as an offset": state(text("w"), tensor(offset=OS_SYSTEM)),
    "as a storage's key": state(text("w"), tensor(storage(key=OS_SYSTEM))),
    "popped again": PROTO + OS_SYSTEM + b"0" + SOUND[2:],
    "by STACK_GLOBAL": PROTO + text("os") + text("system") + STACK_GLOBAL + CALL + STOP,
    "by STACK_GLOBAL from the memo": PROTO + text("os") + b"q\0" + b"0" + b"h\0" + text("system") + STACK_GLOBAL + STOP,
    "STACK_GLOBAL of a tuple": PROTO + group(text("os")) + text("system") + STACK_GLOBAL + STOP,
    "STACK_GLOBAL of numbers": PROTO + number(1) + number(2) + STACK_GLOBAL + STOP,
    "STACK_GLOBAL of an allowed name": PROTO + REBUILD_LATER + NONE + BUILD + STOP,
    "by INST": PROTO + MARK + text("touch /tmp/x") + b"ios\nsystem\n" + STOP,
    "by OBJ": PROTO + MARK + name("os", "system") + text("touch /tmp/x") + b"o" + STOP,
    "by NEWOBJ": PROTO + name("collections", "OrderedDict") + EMPTY_TUPLE + b"\x81" + STOP,
    "by NEWOBJ_EX": PROTO + name("collections", "OrderedDict") + EMPTY_TUPLE + DICT + b"\x92" + STOP,
    "by extension code": PROTO + b"\x82\x01" + STOP,
    "BUILD on a dict": PROTO + DICT + DICT + text("__reduce__") + text("os.system") + SETITEM + BUILD + STOP,
    "BUILD on a tensor": state(text("w"), tensor() + DICT + BUILD),
    "BUILD on a class": PROTO + name("collections", "OrderedDict") + DICT + BUILD + STOP,
    "BUILD with nothing": PROTO + DICT + BUILD + STOP,
    "REDUCE of a string": PROTO + text("os.system") + CALL + STOP,
    "REDUCE of a storage class": PROTO + name("torch", "FloatStorage") + group(number(GIANT)) + REDUCE + STOP,
    "REDUCE of a dtype": PROTO + name("torch", "float32") + group(text("x")) + REDUCE + STOP,
    "REDUCE without a tuple": PROTO + name("collections", "OrderedDict") + DICT + REDUCE + STOP,
    "persistent id of a string": PROTO + text("/etc/passwd") + PERSID + STOP,
    "persistent id of text": PROTO + b"P/etc/passwd\n" + STOP,
    "persistent id of a module": PROTO + group(text("module"), text("os"), text("x"), text("y")) + PERSID + STOP,
    "set": PROTO + b"\x8f" + STOP,
    "out-of-band buffer": PROTO + b"\x97" + STOP,
}

PICKLES: dict[str, bytes] = {
    "empty": b"",
    "no stop": SOUND[:-1],
    "unknown opcode": PROTO + b"\xff" + STOP,
    "stop at once": STOP,
    "mark missing": PROTO + TUPLE + STOP,
    "stack empty": PROTO + b"0" + STOP,
    "takes from below a mark": PROTO + number(1) + MARK + b"\x85" + STOP,
    "memo empty": PROTO + b"h\7" + STOP,
    "string cut": PROTO + b"X" + struct.pack("<I", 1 << 31) + b"abc",
    "string of 2**62": PROTO + b"\x8d" + struct.pack("<Q", 1 << 62) + b"abc",
    "bytes of 2**62": PROTO + b"\x8e" + struct.pack("<Q", 1 << 62) + b"abc",
    "number of 2 GB": PROTO + b"\x8b" + struct.pack("<i", (1 << 31) - 1) + b"abc",
    "number of negative size": PROTO + b"\x8b" + struct.pack("<i", -5) + b"abc",
    "number of 10,000 digits": PROTO + b"L" + b"9" * 10_000 + b"L\n" + STOP,
    "string not UTF-8": PROTO + b"X" + struct.pack("<I", 2) + b"\xff\xfe" + STOP,
    "not a dict": PROTO + number(3) + STOP,
    "no tensors": PROTO + DICT + STOP,
    "two dicts of tensors": state(*(t + DICT + text("w") + tensor() + SETITEM for t in (text("a"), text("b")))),
    "key without value": PROTO + DICT + MARK + text("w") + SETITEMS + STOP,
    "tuple as key": state(group(text("w")), tensor()),
    "append to a dict": PROTO + DICT + number(1) + b"a" + STOP,
    "storage of unknown type": state(text("w"), tensor(storage("QUInt8Storage"))),
    "storage not in the file": state(text("w"), tensor(storage(key=text("9")))),
    "storage outside": state(text("w"), tensor(storage(key=text("../data.pkl")))),
    "storage key a number": state(text("w"), tensor(storage(key=number(0)))),
    "storage larger than its bytes": state(text("w"), tensor(storage(size=7))),
    "storage giant": state(text("w"), tensor(storage(size=GIANT))),
    "storage negative": state(text("w"), tensor(storage(size=-6))),
    "shape past the storage": state(text("w"), tensor(shape=(3, 3))),
    "shape giant": state(text("w"), tensor(shape=(GIANT, GIANT))),
    "shape giant, strides zero": state(text("w"), tensor(shape=(1 << 20, 1 << 20), strides=(0, 0))),
    "shape zero beside giants": state(text("w"), tensor(shape=(0, GIANT, GIANT), strides=(0, 0, 0))),
    "shape negative": state(text("w"), tensor(shape=(-2, 3))),
    "shape of 100 dimensions": state(text("w"), tensor(shape=(1,) * 100, strides=(1,) * 100)),
    "stride past the storage": state(text("w"), tensor(strides=(4, 1))),
    "stride negative": state(text("w"), tensor(strides=(-3, 1))),
    "stride giant": state(text("w"), tensor(strides=(GIANT, 1))),
    "strides too few": state(text("w"), tensor(strides=(1,))),
    "offset past the storage": state(text("w"), tensor(offset=number(1))),
    "offset negative": state(text("w"), tensor(offset=number(-1))),
    "offset giant": state(text("w"), tensor(offset=number(1 << 200))),
    "offset a string": state(text("w"), tensor(offset=text("0"))),
    "tensor of a tensor": state(text("w"), tensor(tensor())),
    "parameter of nothing": state(
        text("w"), name("torch._utils", "_rebuild_parameter") + group(NONE, FALSE, NONE) + REDUCE
    ),
}

_ZIP = archive()
_CENTRAL = _ZIP.index(b"PK\x01\x02")


def _compressed() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as out:
        out.writestr("archive/data.pkl", SOUND)
        out.writestr("archive/data/0", bytes(1 << 20))
    return target.getvalue()


def _twice() -> bytes:
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as out:
        out.writestr("archive/data.pkl", SOUND)
        out.writestr("archive/data/0", bytes(24))
        out.writestr("archive/data/1", bytes(24))
    return target.getvalue().replace(b"archive/data/1", b"archive/data/0")


def _patched(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def _last_member_on_the_first() -> bytes:
    last = _ZIP.rindex(b"PK\x01\x02")
    return _patched(_ZIP, last + 42, struct.pack("<I", 0))


CONTAINERS: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"not a model",
    "plain pickle": lambda: SOUND,
    "zip cut": lambda: _ZIP[:-30],
    "zip cut in the middle": lambda: _ZIP[:200],
    "zip magic only": lambda: b"PK\x03\x04",
    "zip without pickle": lambda: archive(b"").replace(b"data.pkl", b"data.pkx"),
    "two pickles": lambda: archive(**{"more/data.pkl": SOUND}),
    "pickle changed": lambda: _ZIP.replace(b"cpu", b"gpu"),
    "compressed members": _compressed,
    "member twice": _twice,
    "member size giant": lambda: _patched(_ZIP, _CENTRAL + 20, struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)),
    "member offset giant": lambda: _patched(_ZIP, _CENTRAL + 42, struct.pack("<I", 0xFFFFFFF0)),
    "member sizes differ": lambda: _patched(_ZIP, _CENTRAL + 20, struct.pack("<I", 5)),
    "members overlap": _last_member_on_the_first,
    "encrypted member": lambda: _patched(_ZIP, _CENTRAL + 8, struct.pack("<H", 1)),
    "big-endian": lambda: archive(byteorder=b"big"),
    "TorchScript": lambda: archive(**{"constants.pkl": b"x", "code/model.py": b"x"}),
    "storage shorter": lambda: archive(storages={"0": bytes(20)}),
    "legacy cut in the magic": lambda: legacy()[:10],
    "legacy cut in the pickle": lambda: legacy()[:60],
    "legacy cut in the storage": lambda: legacy()[:-1],
    "legacy without storage": lambda: legacy(data=b""),
    "legacy of another version": lambda: legacy(version=999),
    "legacy big-endian": lambda: legacy(little=b"\x89"),
    "legacy without keys": lambda: legacy(keys=PROTO + LIST + STOP),
    "legacy keys a dict": lambda: legacy(keys=PROTO + DICT + STOP),
    "legacy key unknown": lambda: legacy(keys=PROTO + LIST + text("1") + b"a" + STOP),
    "legacy key twice": lambda: legacy(keys=PROTO + LIST + text("0") + b"a" + text("0") + b"a" + STOP),
    "legacy key a number": lambda: legacy(keys=PROTO + LIST + number(0) + b"a" + STOP),
    "legacy storage size giant": lambda: legacy(data=struct.pack("<q", GIANT) + bytes(24)),
    "legacy storage size negative": lambda: legacy(data=struct.pack("<q", -1) + bytes(24)),
    "legacy string giant": lambda: legacy(value=PROTO + b"\x8d" + struct.pack("<Q", 1 << 62)),
    "legacy attack": lambda: legacy(value=ATTACKS["os.system"]),
}


def refused(content: bytes, path: Path, message: str = "") -> str:
    """The error that a file gives, after checking that it took no memory and ran nothing."""
    modules = set(sys.modules)
    said = malformed.refused(content, path, message, times=64)
    assert not Path("/tmp/pickle_was_executed").exists()
    assert not {module for module in set(sys.modules) - modules if module.startswith(("torch", "subprocess"))}
    return said


@pytest.mark.parametrize("pickle", ATTACKS.values(), ids=ATTACKS.keys())
def test_attack(pickle: bytes, tmp_path: Path) -> None:
    refused(archive(pickle), tmp_path / "bad.pth", "its pickle ")
    refused(legacy(pickle), tmp_path / "bad.pth", "its pickle ")


def test_attacks_are_named(tmp_path: Path) -> None:
    assert "'os.system', which is not on the list" in refused(archive(ATTACKS["os.system"]), tmp_path / "bad.pth")
    assert "uses opcode INST" in refused(archive(ATTACKS["by INST"]), tmp_path / "bad.pth")
    assert "(BUILD) that is not an OrderedDict" in refused(archive(ATTACKS["BUILD on a dict"]), tmp_path / "bad.pth")


@pytest.mark.parametrize("pickle", PICKLES.values(), ids=PICKLES.keys())
def test_pickle(pickle: bytes, tmp_path: Path) -> None:
    refused(archive(pickle), tmp_path / "bad.pth")


@pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
def test_container(make: Callable[[], bytes], tmp_path: Path) -> None:
    refused(make(), tmp_path / "bad.pth")


def test_exponential_nesting_costs_nothing(tmp_path: Path) -> None:
    twice = [MARK + b"h" + bytes([i]) + b"h" + bytes([i]) + TUPLE + b"q" + bytes([i + 1]) + b"0" for i in range(200)]
    doubled = LIST + b"q\0" + b"0" + b"".join(twice) + b"h" + bytes([200])
    bomb = state(text("w"), tensor(), text("bomb"), doubled)
    path = tmp_path / "bomb.pth"
    path.write_bytes(archive(bomb))
    assert list(open_checkpoint(path).tensors) == ["w"]
    path.write_bytes(legacy(bomb))
    assert list(open_checkpoint(path).tensors) == ["w"]


@pytest.mark.parametrize("content", [archive(), legacy()], ids=["zip", "legacy"])
def test_the_sound_files_open(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.pth"
    path.write_bytes(content)
    reader = open_checkpoint(path)
    assert reader.tensors["w"].shape == (2, 3)
    assert reader.read("w").tobytes() == bytes(24)


def test_views_of_storages_in_old_files(tmp_path: Path) -> None:
    whole, part = b"\x4e", group(text("1"), number(2), number(3))

    def place(view: bytes) -> bytes:
        return group(text("storage"), name("torch", "FloatStorage"), text("0"), text("cpu"), number(6), view) + PERSID

    both = state(
        *(text("whole"), tensor(place(whole))),
        *(text("part"), tensor(place(part), offset=number(1), shape=(2,), strides=(1,))),
    )
    path = tmp_path / "views.pth"
    path.write_bytes(legacy(both, data=struct.pack("<q6f", 6, *range(6))))
    assert open_checkpoint(path).read("whole").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert open_checkpoint(path).read("part").tolist() == [3, 4]
    beyond = state(text("part"), tensor(place(part), shape=(4,), strides=(1,)))
    assert "leaves its storage of 12 bytes" in refused(legacy(beyond), tmp_path / "bad.pth")
    outside = group(text("1"), number(4), number(3))
    beyond = state(text("part"), tensor(place(outside), shape=(1,), strides=(1,)))
    assert "a view of 3 elements from 4 on leaves its storage of 6" in refused(legacy(beyond), tmp_path / "bad.pth")


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(["zip.pth", "legacy.pth", "module_protocol4.pth"]), st.data())
def test_changed_bytes_never_do_worse_than_a_checkpoint_error(
    tmp_path_factory: pytest.TempPathFactory, file: str, data: st.DataObject
) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.pth"
    path.write_bytes(malformed.changed((FILES / file).read_bytes(), data))
    malformed.read_or_refused(path)
