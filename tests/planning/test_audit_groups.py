"""Every way in which XLA writes down which devices talk with each other."""

import pytest

from spmd_infer.planning.audit import collectives

PAIRS, COLUMNS = ((0, 1), (2, 3)), ((0, 2), (1, 3))


@pytest.mark.parametrize(
    ("written", "groups"),
    [
        ("{{0,1},{2,3}}", PAIRS),
        ("[2,2]<=[4]", PAIRS),
        ("[2,2]<=[2,2]T(1,0)", COLUMNS),
        ("mesh['a'=2,'b'=2] {'b'}", PAIRS),
        ("mesh['a'=2,'b'=2] {'a'}", COLUMNS),
        ("mesh['a'=2,'b'=2] {'a','b'}", ((0, 1, 2, 3),)),
        ("mesh['axis_0'=1,'axis_1'=2,'axis_2'=2,'axis_3'=1] {'axis_1'}", COLUMNS),
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", COLUMNS),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", COLUMNS),
        ("mesh['a'=4] {'a':(2)2}", PAIRS),
        ("mesh['a'=4] {'a':(1)2}", COLUMNS),
        ("mesh['a'=8] {'a':(1)2,'a':(4)2}", ((0, 1, 4, 5), (2, 3, 6, 7))),
    ],
)
def test_replica_groups(written: str, groups: tuple[tuple[int, ...], ...]) -> None:
    line = f"  %r = f32[16,10]{{1,0}} all-reduce(%x), channel_id=9, replica_groups={written}, to_apply=%add"
    (found,) = collectives(line)
    assert found.groups == groups
    assert found.kind == "all-reduce"
    assert found.nbytes == 640
