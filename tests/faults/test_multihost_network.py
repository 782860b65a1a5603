"""Two hosts with addresses of their own, as network namespaces joined by a virtual cable, which is then cut."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_multihost import PROGRAM, report
from tests.multihost.processes import Ranks

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ADDRESSES = ("10.211.7.1", "10.211.7.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Names of two namespaces that reach each other."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2 (scripts/ci-cluster install)")
    names = tuple(f"si{os.getpid() % 10000}{side}" for side in "ab")
    folders = [Path("/etc/netns") / name for name in names]
    try:
        try:
            ip("netns", "add", names[0])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"this machine allows no network namespaces: {error.stderr.decode().strip()}")
        ip("netns", "add", names[1])
        ip("link", "add", f"{names[0]}v", "netns", names[0], "type", "veth", "peer", f"{names[1]}v", "netns", names[1])
        for name, address, folder in zip(names, ADDRESSES, folders, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", f"{name}v")
            ip("-n", name, "link", "set", f"{name}v", "up")
            ip("-n", name, "link", "set", "lo", "up")
            folder.mkdir(parents=True)
            # gloo announces the address that the machine's own name resolves to.
            (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
        yield names[0], names[1]
    finally:
        for name, folder in zip(names, folders, strict=True):
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=20, check=False)
            shutil.rmtree(folder, ignore_errors=True)


def test_a_cut_cable_ends_both_sides_each_naming_the_other(hosts: tuple[str, str], tmp_path: Path) -> None:
    prefix = {rank: ["ip", "netns", "exec", name] for rank, name in enumerate(hosts)}
    coordinator = f"{ADDRESSES[0]}:23000"
    with Ranks(
        PROGRAM, 2, tmp_path, "nothing", "60", devices=2, prefix=prefix, SPMD_INFER_COORDINATOR=coordinator
    ) as ranks:
        ranks.until("running")
        begin = time.monotonic()
        ip("-n", hosts[0], "link", "set", f"{hosts[0]}v", "down")
        codes = ranks.wait(40)
        report("cable cut, heartbeat 10 s", ranks.last() - begin, 15.0)
        assert all(code != 0 for code in codes.values())
        lost = "is lost: no word for 10 s, its host is down or the network is cut"
        assert f"the job ends: rank 1 ({socket.gethostname()}, pid " in ranks.err(0)
        assert f"the job ends: coordinator rank 0 ({socket.gethostname()}, pid " in ranks.err(1)
        assert all(lost in ranks.err(rank) for rank in codes)
