"""Jobs of one process, run in this one."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from spmd_infer import task_table
from spmd_infer.compile_cache import use_compile_cache
from spmd_infer.jobs.run import Outcome, run_job
from spmd_infer.jobs.sources import format_of
from spmd_infer.jobs.spec import JobSpec, RunOptions
from spmd_infer.multihost.job import Job
from spmd_infer.multihost.place import Place
from tests.jobs.packaged_task import install_shout
from tests.references.llama_variants import write_checkpoint

DIGITS = "tests/fixtures/digits_cnn"


class OneProcess(Job):
    """A job of this process, which is told to stop before it begins so many units."""

    def __init__(self, units: int | None = None) -> None:
        super().__init__(Place(0, 1, "", 0, "test"), None, ["here"], [0])
        self._units = None if units is None else units + 1  # run_job asks once before the first

    def should_stop(self) -> bool:
        if self._units is None:
            return False
        self._units -= 1
        return self._units < 0


@pytest.fixture
def shout(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a package that offers the task ``shout``."""
    folder = install_shout(tmp_path_factory.mktemp("shouting"))
    monkeypatch.syspath_prepend(folder)
    task_table.find_task.cache_clear()
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return folder


@pytest.fixture(scope="package", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """These tests load the same few models again and again."""
    names = ("dir", "persistent_cache_min_compile_time_secs", "persistent_cache_min_entry_size_bytes")
    options = [f"jax_{'compilation_cache_' if name == 'dir' else ''}{name}" for name in names]
    before = [getattr(jax.config, option) for option in options]
    folder = tmp_path_factory.mktemp("xla")
    folder.chmod(0o700)
    compilation_cache.reset_cache()
    use_compile_cache(folder)
    yield
    for option, value in zip(options, before, strict=True):
        jax.config.update(option, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer of single bytes and a chat template."""
    model = tmp_path_factory.mktemp("llama")
    write_checkpoint(model, "gqa", eos_token_id=0)
    letters = sorted(ByteLevel.alphabet())[:127]
    vocab = {"<eos>": 0} | {letter: place + 1 for place, letter in enumerate(letters)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(model / "tokenizer.json"))
    (model / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    )
    return model


Run = Callable[..., Outcome]


@pytest.fixture
def run() -> Run:
    """Runs a job: model, task, input, output, and what else its spec or the run's options take."""

    def run_one(
        model: str | Path, task: str, source: Path, output: Path, units: int | None = None, **more: Any
    ) -> Outcome:
        names = set(RunOptions.__struct_fields__)
        options = RunOptions(quiet=True, **{name: value for name, value in more.items() if name in names})
        rest = {name: value for name, value in more.items() if name not in names}
        kind = rest.pop("format", None) or format_of(source)
        spec = JobSpec(model=str(model), task=task, input=str(source), format=kind, output=str(output), **rest)
        return run_job(spec, OneProcess(units), options)

    return run_one
