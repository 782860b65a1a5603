"""Files that belong to a model beside its weights: tokenizer, chat template, how it was fine-tuned to be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from spmd_infer.checkpoints.file_bytes import FileBytes
from spmd_infer.checkpoints.folder_files import inside
from spmd_infer.checkpoints.manifest import METADATA_NAME, StoredFile
from spmd_infer.checkpoints.reader import Reader

NAMES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
    "preprocessor_config.json", "processor_config.json", "modules.json", "sentence_bert_config.json",
    "1_Pooling/config.json",
)  # fmt: skip
_MOST_BYTES = 256 << 20


def copy_side_files(source: Path, target: Path) -> list[str]:
    """Copy those that a folder has; returns their names."""
    copied = []
    for name in NAMES:
        file = source / name
        parent, _, base = name.rpartition("/")
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            continue
        (target / parent).mkdir(exist_ok=True)
        shutil.copyfile(inside(source / parent, base), target / name)
        copied.append(name)
    return copied


def write_side_files(reader: Reader, target: Path) -> list[StoredFile]:
    """Copy a checkpoint's side files into a native one, and its header's fields where it has any."""
    names = copy_side_files(reader.folder, target)
    if reader.metadata:
        (target / METADATA_NAME).write_text(json.dumps(dict(reader.metadata)))
        names.append(METADATA_NAME)
    return [describe(target, name) for name in names]


def describe(folder: Path, name: str) -> StoredFile:
    """Size and digest of a file."""
    from spmd_infer.checkpoints.native_reader import file_digest

    opened = FileBytes(folder / name)
    return StoredFile(name, opened.size, file_digest(opened))
