"""Which reader opens what, and what is said when none does."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from spmd_infer.checkpoints import Format, Reader, TensorInfo, formats, open_checkpoint
from spmd_infer.errors import CheckpointError, UnknownFormatError

TORCH_FILES = Path(__file__).parents[1] / "fixtures" / "torch_files"


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: no such file or folder"):
        open_checkpoint(tmp_path / "none")


def test_unknown_file_lists_the_known_formats_and_what_was_found(tmp_path: Path) -> None:
    file = tmp_path / "weights.xyz"
    file.write_bytes(b"hello there")
    with pytest.raises(UnknownFormatError) as caught:
        open_checkpoint(file)
    said = str(caught.value)
    assert said.startswith(f"{file}: no reader knows this format")
    assert "a file of 11 bytes that begins with b'hello there'" in said
    for name in ("gguf: a .gguf file", "safetensors: a .safetensors file", "pth: a PyTorch state dict"):
        assert name in said


def test_unknown_folder_lists_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UnknownFormatError, match=r"a folder with notes\.txt"):
        open_checkpoint(tmp_path)


def test_folder_with_one_file_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes((TORCH_FILES / "module.pth").read_bytes())
    (tmp_path / "config.json").write_text('{"architectures": ["Net"]}')
    reader = open_checkpoint(tmp_path)
    assert reader.stored == "pth"
    assert reader.architecture == "Net"
    # Beside a file of another name, a config.json may be anyone's.
    (tmp_path / "other.pth").write_bytes((TORCH_FILES / "module.pth").read_bytes())
    assert open_checkpoint(tmp_path / "other.pth").config == {}
    with pytest.raises(CheckpointError, match=r"2 checkpoint files \(other\.pth, pytorch_model\.bin\)"):
        open_checkpoint(tmp_path)


def test_first_bytes_tell_the_format_where_the_suffix_does_not(tmp_path: Path) -> None:
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "0123abcd")
    assert open_checkpoint(tmp_path / "0123abcd").stored == "safetensors"
    (tmp_path / "legacy").write_bytes((TORCH_FILES / "legacy.pth").read_bytes())
    assert open_checkpoint(tmp_path / "legacy").stored == "pth"


@dataclass
class TextReader:
    """A third party's reader of one vector in a text file."""

    path: Path
    stored: str = "text"
    config: dict[str, Any] = field(default_factory=dict)
    architecture: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.path.parent

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        size = len(self.path.read_text().split())
        return {"line": TensorInfo("line", (size,), np.dtype(np.float64), size * 8, self.path)}

    def read(self, name: str, index: tuple[slice, ...] | None = None) -> np.ndarray:
        return np.array(self.path.read_text().split(), np.float64)[index or ()]


TEXT = Format("text", "a .vector file", lambda path, _: path.suffix == ".vector", TextReader)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    import sys
    from types import ModuleType

    module = ModuleType("a_third_party")
    module.TEXT = TEXT  # type: ignore[attr-defined]
    module.WRONG = 3  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_third_party", module)
    points = [
        EntryPoint("text", "a_third_party:TEXT", formats.ENTRY_POINT_GROUP),
        EntryPoint("wrong", "a_third_party:WRONG", formats.ENTRY_POINT_GROUP),
        EntryPoint("gone", "not_installed_at_all:FORMAT", formats.ENTRY_POINT_GROUP),
    ]
    monkeypatch.setattr(formats, "entry_points", lambda group: points if group == "spmd_infer.readers" else [])
    return


@pytest.mark.usefixtures("installed")
def test_readers_of_other_packages(tmp_path: Path) -> None:
    file = tmp_path / "a.vector"
    file.write_text("1 2 3")
    reader = open_checkpoint(file)
    assert isinstance(reader, Reader)
    assert reader.read("line", (slice(1, 3),)).tolist() == [2, 3]
    with pytest.raises(UnknownFormatError) as caught:
        open_checkpoint(Path(__file__))
    said = str(caught.value)
    assert "text: a .vector file" in said
    assert "wrong (a_third_party:WRONG) is a int, expected a Format" in said
    assert "gone (not_installed_at_all:FORMAT) cannot be imported" in said
