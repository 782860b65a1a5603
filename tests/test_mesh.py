import jax
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from spmd_infer.errors import MeshError
from spmd_infer.mesh import MeshSpec, auto_mesh, spec_of


def test_parse_and_print() -> None:
    spec = MeshSpec.parse(" model=4, data=2")
    assert spec == MeshSpec.of(data=2, model=4)
    assert str(spec) == "data=2,model=4"  # outermost first, whatever the order given
    assert spec.shape == {"data": 2, "model": 4}
    assert spec.size == 8


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot read ''"),
        ("data", "cannot read 'data'"),
        ("data=two", "cannot read 'data=two'"),
        ("data=-1", "cannot read 'data=-1'"),
        ("data=0", "size 0"),
        ("rows=2", "unknown mesh axis 'rows'"),
        ("data=2,data=4", "given 2 times"),
    ],
)
def test_bad_text(text: str, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        MeshSpec.parse(text)


def test_build_uses_auto_axes_and_the_first_devices() -> None:
    mesh = MeshSpec.parse("data=2,model=2").build()
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert [device.id for device in mesh.devices.flat] == [0, 1, 2, 3]


def test_too_few_devices() -> None:
    with pytest.raises(MeshError, match="16 places but there are 8"):
        MeshSpec.parse("data=16").build()


class _FakeDevice:
    """A device of a host, as far as ordering looks at it."""

    platform = "cpu"

    def __init__(self, number: int, host: int) -> None:
        self.id, self.process_index = number, host


def test_hosts_are_outermost() -> None:
    interleaved = [_FakeDevice(number, number % 2) for number in range(8)]
    mesh = MeshSpec.parse("data=2,model=4").build(interleaved)  # type: ignore[arg-type]
    assert [{device.process_index for device in row} for row in mesh.devices] == [{0}, {1}]


def test_a_callers_mesh_becomes_auto() -> None:
    devices = np.array(jax.devices()).reshape(2, 4)
    explicit = Mesh(devices, ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    made = auto_mesh(explicit)
    assert made.axis_types == (AxisType.Auto,) * 2
    assert spec_of(made) == MeshSpec.of(data=2, model=4)
    with pytest.raises(MeshError, match="unknown mesh axis 'x'"):
        auto_mesh(Mesh(devices, ("x", "model")))
