"""The page is well-formed, stands alone, and says what the plan says; so does the terminal."""

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from flax import nnx

import spmd_infer as si
from spmd_infer.axes import AxisRules
from spmd_infer.functional import model_function
from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.estimates import gigabytes
from spmd_infer.planning.explain import device_names, milliseconds
from spmd_infer.planning.layout import weight_layouts
from spmd_infer.planning.layouts import TWO_D
from spmd_infer.planning.page import page
from spmd_infer.planning.weight_groups import holders, pieces, weight_groups

SPACE = {"x": "http://www.w3.org/1999/xhtml", "s": "http://www.w3.org/2000/svg"}


class Net(nnx.Module):
    def __init__(self, layers: int = 3) -> None:
        self.up = nnx.List([nnx.Param(np.ones((96, 64), np.float32), axes=("mlp", "embed")) for _ in range(layers)])
        self.down = nnx.List([nnx.Param(np.ones((64, 96), np.float32), axes=("embed", "mlp")) for _ in range(layers)])
        self.scale = nnx.Param(np.ones((64,), np.float32), axes=("embed",))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + (x @ up[...].T) @ down[...].T
        return x * self.scale[...]


@pytest.fixture(scope="module")
def plans() -> list[si.MeshPlan]:
    example = np.ones((8, 64), np.float32)
    return [
        si.plan(Net(), devices="16xH100", hosts=2, example=example, mesh="data=4,model=4"),
        si.plan(Net(), devices="16xH100", hosts=2, example=example),
        si.plan(Net(), devices="144xGB200", hosts=36, example=example),
        si.plan(Net(), devices=1, example=example),
        si.plan(nnx.Linear(64, 96, rngs=nnx.Rngs(0)), devices=8),
        si.plan(nnx.Linear(64, 96, rngs=nnx.Rngs(0)), devices="512xv4", mesh="data=16,model=32"),
    ]


def text_of(document: str) -> str:
    root = ET.fromstring(document)
    return " ".join(" ".join(root.itertext()).split())


def test_well_formed_and_self_contained(plans: list[si.MeshPlan]) -> None:
    for plan in plans:
        document = page(plan)
        root = ET.fromstring(document)
        assert root.find("x:body/x:h1", SPACE) is not None
        assert len(root.findall(".//s:svg", SPACE)) >= 3
        assert not root.findall(".//x:script", SPACE)
        names = {"http://www.w3.org/1999/xhtml", "http://www.w3.org/2000/svg"}
        assert set(re.findall(r"https?://[^\"<> ]+", document)) <= names
        assert not re.search(r"\b(src|href|xlink:href|@import|url\()\s*=?", document)
        assert len(document) < 2_000_000


def test_it_contains_the_numbers_of_the_plan(plans: list[si.MeshPlan]) -> None:
    for plan in plans:
        said, data = text_of(page(plan)), plan.to_dict()
        for candidate in data["candidates"]:
            assert ",".join(f"{axis}={size}" for axis, size in candidate["mesh"].items()) in said
            assert gigabytes(candidate["memory_bytes"]["total"]) in said
            if candidate["seconds"]:
                assert milliseconds(candidate["seconds"]["total"]) in said
            if candidate["rejected"]:
                assert candidate["rejected"] in said
        for name, number in data["candidates"][0]["memory_bytes"].items():
            if name != "total":
                assert f"{name} {gigabytes(number)}" in said
        for phase in data["candidates"][0]["phases"]:
            for part in ("compute", "memory", "collectives"):
                assert milliseconds(phase["seconds"][part]) in said
            assert phase["collectives"] in said
        for note in data["notes"]:
            assert note in said
        assert str(data["hardware"]["source"]) in said


def test_every_device_is_drawn_on_its_host(plans: list[si.MeshPlan]) -> None:
    for plan in plans:
        drawn = re.findall(r"<title>device (\d+): ([^<]*)</title>", page(plan))
        assert [int(number) for number, _ in drawn] == list(range(plan.mesh.size))
        assert len({place for _, place in drawn}) == plan.mesh.size
        hosts = re.findall(r">host (\d+)<", page(plan))
        assert len(hosts) == -(-plan.mesh.size // min(plan.cluster.per_host, plan.mesh.size))


def test_text_from_outside_is_escaped() -> None:
    def odd(params: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        return x @ params["<script>&"]

    odd.__name__ = odd.__qualname__ = "<b>&model"
    document = page(si.plan(odd, {"<script>&": np.ones((4096, 512), np.float32)}, devices=8, mesh="data=2,model=4"))
    ET.fromstring(document)
    assert "<script>" not in document
    assert "&lt;script&gt;&amp;" in document


def test_terminal_says_the_same(plans: list[si.MeshPlan]) -> None:
    plan = plans[0]
    text, chosen = plan.explain(), plan.chosen
    assert "up.*" in text
    assert "96 mlp / model x 64 embed" in text
    assert gigabytes(chosen.memory.weights) in text
    assert chosen.time is not None
    assert milliseconds(chosen.time.total) in text
    (bar,) = re.findall(r"^  \|([#=+:.r]+)\|$", text, re.MULTILINE)
    assert len(bar) == 60
    assert bar.count("r") == 6  # the tenth that plans keep free
    assert max(map(len, text.splitlines())) < 250


def test_groups_count_every_byte_once() -> None:
    model, mesh = model_function(Net(5)), MeshSpec.of(data=2, model=4)
    layouts = weight_layouts(model, AxisRules(), mesh.shape)
    groups = weight_groups(layouts)
    assert {(g.pattern, g.count) for g in groups} == {("up.*", 5), ("down.*", 5), ("scale", 1)}
    assert sum(g.nbytes for g in groups) == sum(layout.nbytes for layout in layouts)
    assert sum(g.device_bytes for g in groups) == sum(layout.device_bytes for layout in layouts)


@pytest.mark.parametrize("rules", [AxisRules(), TWO_D], ids=["1d", "2d"])
def test_pieces_lie_where_jax_puts_them(rules: AxisRules) -> None:
    import jax
    from jax.sharding import NamedSharding

    spec = MeshSpec.of(data=2, model=4)
    mesh = spec.build()
    ids = {device: number for number, device in enumerate(mesh.devices.flat)}
    for group in weight_groups(weight_layouts(model_function(Net()), rules, spec.shape)):
        cuts = pieces(group, spec)
        found: dict[tuple[int, ...], list[int]] = {}
        for device, index in NamedSharding(mesh, group.spec).devices_indices_map(group.shape).items():
            place = [(part.start or 0) * cut // size for part, cut, size in zip(index, cuts, group.shape, strict=True)]
            found.setdefault(tuple(place), []).append(ids[device])
        assert {key: sorted(value) for key, value in found.items()} == holders(group, spec)
        assert group.parts == len(found)
    assert jax.device_count() == 8


def test_names_of_devices() -> None:
    assert device_names([3]) == "device 3"
    assert device_names([3, 7]) == "devices 3,7"
    assert device_names([0, 1, 2, 3, 8, 10, 11, 12]) == "devices 0-3,8,10-12"
