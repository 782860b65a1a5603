"""Meshes over processes that share hosts, whichever way the scheduler dealt out the ranks."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.multihost.processes import Ranks

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

PROGRAM = """
import spmd_infer as si
from spmd_infer.errors import MeshError
from spmd_infer.planning.hardware import found_cluster

with si.initialize(quiet=True) as job:
    import jax

    mesh = si.MeshSpec.parse("data=2,model=4").build()
    print("rows", [[device.process_index for device in row] for row in mesh.devices.tolist()])
    print("hosts", found_cluster(jax.devices()).hosts, job.hosts)
    try:
        si.MeshSpec.parse("data=6").build()
    except MeshError as error:
        print(error)
"""

# gloo asks for the address of the host's own name.
NAMED = 'hostname "$0"; mount --bind "$1" /etc/hosts; shift; exec "$@"'


def can_name_hosts() -> bool:
    tried = ["unshare", "--uts", "--mount", "true"]
    return (
        os.geteuid() == 0
        and shutil.which("unshare") is not None
        and subprocess.run(tried, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not can_name_hosts(), reason="naming hosts needs root and unshare")
def test_the_model_axis_stays_inside_a_host(tmp_path: Path) -> None:
    """Ranks 0 and 2 on one host, 1 and 3 on another, as ``srun --distribution=cyclic`` places them."""
    names = {rank: ("hosta", "hostb")[rank % 2] for rank in range(4)}
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.1 localhost hosta hostb\n")
    prefix = {
        rank: ["unshare", "--uts", "--mount", "sh", "-c", NAMED, name, str(hosts)] for rank, name in names.items()
    }
    with Ranks(PROGRAM, 4, tmp_path, devices=2, prefix=prefix) as ranks:
        assert set(ranks.wait(120).values()) == {0}, ranks.err(0)
        for rank in range(4):
            assert "rows [[0, 0, 2, 2], [1, 1, 3, 3]]" in ranks.out(rank)
            assert "hosts 2 ('hosta', 'hostb', 'hosta', 'hostb')" in ranks.out(rank)
            assert "mesh data=6 has 6 places for 8 devices: process 3 would have no part in it" in ranks.out(rank)
