"""What an engine is asked for in words and pictures: ``generate``, ``embed``, ``classify`` and so on, by its tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax.sharding import Mesh

from spmd_infer.errors import TaskError
from spmd_infer.task_table import find_task, needs_family

if TYPE_CHECKING:
    from spmd_infer.models.registry import Family


class TaskVerbs(ABC):
    """An engine's tasks, and their verbs."""

    _tasks: dict[str, Any]

    @property
    @abstractmethod
    def mesh(self) -> Mesh:
        """The mesh."""

    @property
    @abstractmethod
    def family(self) -> Family | None:
        """The family of a zoo model; None for a model of the caller's own."""

    def task(self, name: str, options: Any = None) -> Any:
        """The engine's task of that name, built on first use.

        Args:
            name: ``generate``, ``embed``, ….
            options: how the task works, such as ``GenerationOptions``; a task that exists is built anew with them.

        Raises:
            TaskError: there is no such task, or this model does not offer it.
        """
        if name not in self._tasks or options is not None:
            task = find_task(name)
            if needs_family(name) and (self.family is None or self.family.task != name):
                what = (
                    f"{self.family.name} models offer {self.family.task!r}"
                    if self.family
                    else "this is a model of your own"
                )
                raise TaskError(f"the loaded model cannot {name}: {what}; infer() takes tensors")
            self._tasks[name] = task(self) if options is None else task(self, options)
        return self._tasks[name]

    def embed(self, texts: Any, **options: Any) -> Any:
        """Embed texts; see ``spmd_infer.tasks.embed.Embed``."""
        return self.task("embed")(texts, **options)

    def classify(self, images: Any, **options: Any) -> Any:
        """Classify images; see ``spmd_infer.tasks.classify.Classify``."""
        return self.task("classify")(images, **options)

    def generate(self, prompts: Any, params: Any = None, **options: Any) -> Any:
        """Continue prompts; see ``spmd_infer.tasks.generate.Generate``.

        In a job of several processes all of them call this; prompts, parameters and adapters are rank 0's, results go
        to all.
        """
        return self.task("generate")(*self._shared(prompts, params, options), **options)

    def stream(self, prompt: Any, params: Any = None, **options: Any) -> Iterator[str]:
        """Continue one prompt piece by piece; see ``spmd_infer.tasks.generate.Generate.stream``.

        In a job of several processes all of them call this, and all get the pieces of rank 0's prompt. The stream goes
        on, and ends, where rank 0 goes on with it or closes it.
        """
        pieces: Iterator[str] = self.task("generate").stream(*self._shared(prompt, params, options), **options)
        return pieces

    def astream(self, prompt: Any, params: Any = None, **options: Any) -> AsyncIterator[str]:
        """As ``stream``, for ``async for``; see ``spmd_infer.tasks.generate.Generate.astream``."""
        pieces: AsyncIterator[str] = self.task("generate").astream(*self._shared(prompt, params, options), **options)
        return pieces

    def _shared(self, prompts: Any, params: Any, options: dict[str, Any]) -> tuple[Any, Any]:
        """Rank 0's prompts and parameters in a job of several processes, its adapters in ``options``."""
        if not self.mesh.is_multi_process:
            return prompts, params
        from spmd_infer.multihost.job import this_job
        from spmd_infer.multihost.requests import shared_request

        prompts, params, options["adapter"] = shared_request(this_job(), prompts, params, options.get("adapter"))
        return prompts, params

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a LoRA adapter beside the weights, for requests that name it: ``generate(prompts, adapter=name)``.

        It may be loaded while requests run, and nothing is compiled for it after the first. In a job of several
        processes all of them call this, and find the same files.

        Args:
            name: what requests call it.
            path: a folder as PEFT saves it, with ``adapter_config.json`` and ``adapter_model.safetensors``.

        Raises:
            TaskError: the model does not generate, the name is taken, or there are more adapters, or of a larger rank,
                than ``GenerationOptions`` says.
            CheckpointError: the adapter is damaged, of a kind that is not implemented, or not one for this model.
        """
        self.task("generate").load_adapter(name, path)

    def drop_adapter(self, name: str) -> None:
        """Drop a LoRA adapter. Requests that use it run to their end; then its place is free.

        Raises:
            TaskError: there is no adapter of that name.
        """
        self.task("generate").drop_adapter(name)

    def score(self, texts: Any, **options: Any) -> Any:
        """Log-probabilities of the tokens of texts; see ``spmd_infer.tasks.generate.Generate.score``.

        In a job of several processes all of them call this; texts and adapters are rank 0's, results go to all.
        """
        texts, _ = self._shared(texts, None, options)
        return self.task("generate").score(texts, **options)
