"""Collectives read off HLO: of real programs, and of lines in every form that XLA prints."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from spmd_infer.mesh import MeshSpec
from spmd_infer.planning.audit import collectives, summary

MESH = MeshSpec.parse("data=2,model=4").build()


def compiled(out: PartitionSpec, *shardings: PartitionSpec) -> jax.stages.Compiled:
    placed = [NamedSharding(MESH, spec) for spec in shardings]
    program = jax.jit(lambda x, w: x @ w, in_shardings=placed, out_shardings=NamedSharding(MESH, out))
    return program.lower(jnp.ones((16, 32)), jnp.ones((32, 64))).compile()


@pytest.mark.parametrize(
    ("shardings", "expected"),
    [
        ((PartitionSpec("data"), PartitionSpec("data"), PartitionSpec()), "none"),
        (
            (PartitionSpec("data"), PartitionSpec("data", "model"), PartitionSpec("model")),
            "1 all-reduce over model (0.00 MB)",
        ),
        ((PartitionSpec(), PartitionSpec("data"), PartitionSpec()), "1 all-gather over data (0.00 MB)"),
        (
            (PartitionSpec(), PartitionSpec(None, ("data", "model")), PartitionSpec(("data", "model"))),
            "1 all-reduce over data,model (0.00 MB)",
        ),
    ],
    ids=["none", "sum over model", "gather over data", "sum over both"],
)
def test_real_programs(shardings: tuple[PartitionSpec, ...], expected: str) -> None:
    assert summary(collectives(compiled(*shardings)), MESH) == expected


@pytest.mark.parametrize(
    ("line", "kind", "nbytes", "axes"),
    [
        ("f32[8,4]{1,0} all-reduce(%x), replica_groups={{0,1,2,3},{4,5,6,7}}", "all-reduce", 128, ("model",)),
        ("bf16[8,4]{1,0} all-gather(%x), replica_groups=[4,2]<=[2,4]T(1,0)", "all-gather", 64, ("data",)),
        ("(f32[4]{0}, s8[8]{0}) all-reduce(%x, %y), replica_groups=[1,8]<=[8]", "all-reduce", 24, ("data", "model")),
        ("(f32[4]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[2,4]<=[8]", "all-gather", 64, ("model",)),
        (
            "f8e4m3fn[4]{0} collective-permute(%x), source_target_pairs={{0,4},{4,0}}",
            "collective-permute",
            4,
            ("data",),
        ),
        ("pred[] all-reduce(%x), replica_groups={}, to_apply=%or", "all-reduce", 1, ("data", "model")),
    ],
)
def test_forms_of_hlo(line: str, kind: str, nbytes: int, axes: tuple[str, ...]) -> None:
    (found,) = collectives(f"HloModule m\n\nENTRY %main {{\n  ROOT %a.1 = {line}\n}}\n")
    assert (found.kind, found.nbytes, found.axes(MESH)) == (kind, nbytes, axes)


def test_what_is_not_a_collective() -> None:
    text = "%a = f32[4]{0} all-reduce-done(%s)\n%b = f32[4]{0} fusion(%all-reduce.1), calls=%f\n"
    assert collectives(text) == []
