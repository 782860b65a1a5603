"""A deep model of equal layers as a function of abstract parameters, without building more than a few of the layers.

Building a hundred layers in Flax and taking them apart takes a second, in which nothing is learnt that the third layer
does not say. Plans need the parameters' shapes and axes alone; the module itself is built where somebody calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Any, TypeVar

from spmd_infer.functional import ModelFunction, Params

BUILT = 3
"""Layers of the model that stands for the deep one."""

_Item = TypeVar("_Item")


def deepened(few: ModelFunction, layers: str, num_layers: int, build: Callable[[], ModelFunction]) -> ModelFunction:
    """The function of a model with many layers.

    Args:
        few: the same model with ``BUILT`` layers, its parameters abstract.
        layers: the path of its list of layers.
        num_layers: how many layers there are to be.
        build: builds the whole model; called when the function is first run.
    """
    whole = cache(build)

    def rebuild(values: Params) -> Any:
        return whole().rebuild(values)

    params, axes = repeated(few.params, layers, num_layers), repeated(few.axes, layers, num_layers)
    return ModelFunction(few.kind, few.name, params, axes, rebuild, few.call)


def repeated(items: Mapping[str, _Item], layers: str, num_layers: int) -> dict[str, _Item]:
    """What is said of each parameter of ``BUILT`` layers by path, said of those of ``num_layers`` layers."""
    return dict(_repeated(items, layers, num_layers))


def _repeated(items: Mapping[str, _Item], layers: str, num_layers: int) -> Iterator[tuple[str, _Item]]:
    last = f"{layers}.{BUILT - 1}."
    of_last = {path.removeprefix(last): item for path, item in items.items() if path.startswith(last)}
    names = list(items)
    for number, path in enumerate(names):
        yield path, items[path]
        ends = path.startswith(last) and (number + 1 == len(names) or not names[number + 1].startswith(last))
        for layer in range(BUILT, num_layers) if ends else ():
            yield from ((f"{layers}.{layer}.{name}", item) for name, item in of_last.items())
