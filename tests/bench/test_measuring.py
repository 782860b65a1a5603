"""Measurements are of the right things, and become entries that plans use."""

import json
import random
from pathlib import Path

import jax
import pytest

from spmd_infer.bench.calibration import save_device, save_links
from spmd_infer.bench.collectives import Links, Reading, fit, measure_collectives
from spmd_infer.bench.device import DeviceFigures, measure_device
from spmd_infer.bench.timing import median_seconds
from spmd_infer.planning.hardware import cores, parse_cluster
from tests.cli.test_commands import run


@pytest.fixture(autouse=True)
def own_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SPMD_INFER_HARDWARE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "spmd-infer" / "hardware.toml"


def readings(links: Links, groups: tuple[int, ...] = (2, 4, 8), noise: float = 0.0) -> list[Reading]:
    random.seed(1)
    blank = [
        Reading(kind, group, size, 0.0)
        for kind in ("all-reduce", "all-gather")
        for group in groups
        for size in (4 << 10, 64 << 10, 1 << 20, 16 << 20, 256 << 20)
    ]
    return [Reading(r.kind, r.group, r.size, links.seconds(r) * random.uniform(1 - noise, 1 + noise)) for r in blank]


@pytest.mark.parametrize(
    "links",
    [Links(370e9, 8e-6, 1e-6, 125e6, 0.0), Links(10e9, 30e-6, 17.5e-6, 0.0, 0.0), Links(200e9, 1e-6, 5e-7, 3e4, 0.0)],
)
def test_constants_are_found_again(links: Links) -> None:
    found = fit(readings(links))
    for name in ("link", "latency", "hop"):
        assert getattr(found, name) == pytest.approx(getattr(links, name), rel=1e-3), name
    assert found.half_size == pytest.approx(links.half_size, rel=1e-2, abs=1.0)
    assert found.error < 1e-3
    noisy = fit(readings(links, noise=0.1))
    assert noisy.error < 0.1
    for large in (64 << 20, 1 << 30):
        reading = Reading("all-reduce", 8, large, 1.0)
        assert noisy.seconds(reading) == pytest.approx(links.seconds(reading), rel=0.2)


def test_no_constant_is_negative() -> None:
    falling = [Reading("all-reduce", 2, size, 1e-3 / size**0.1) for size in (4096, 1 << 16, 1 << 20)]
    found = fit(falling)
    assert min(found.link, found.latency + 1e-30, found.hop + 1e-30, found.half_size + 1e-30) > 0
    with pytest.raises(ValueError, match="at least two devices"):
        fit([])


def test_timing_is_bounded() -> None:
    calls = []
    median_seconds(lambda: calls.append(1), 0.0, least=2)
    assert len(calls) == 3
    median_seconds(lambda: calls.append(1), 10.0, most=5)
    assert len(calls) == 9


@pytest.mark.slow
def test_devices_of_this_process_are_measured() -> None:
    figures = measure_device(0.01)
    assert figures.count == jax.device_count()
    # A core does between one and a thousand billion multiply-adds a second, and reads 0.1 to 1000 GB/s.
    for rate in figures.flops.values():
        assert 1e9 < rate < 1e12 * cores() * 4
    assert 0.01 < figures.experts / figures.flops["float32"] < 2
    assert 1e8 < figures.read < 1e12
    assert 1e-6 < figures.call < 1.0

    found = measure_collectives(0.01, sizes=(4 << 10, 1 << 20))
    assert {(r.kind, r.group) for r in found} == {(k, g) for k in ("all-reduce", "all-gather") for g in (2, 4, 8)}
    assert all(r.seconds > 0 for r in found)


def figures(count: int, f32: float, platform: str = "cpu", kind: str = "cpu") -> DeviceFigures:
    rates = {"float32": f32 * 1e12, "bfloat16": 2e12, "int8": 4e12}
    experts = 0.6e12 * f32 if platform == "cpu" else 0.0
    return DeviceFigures(
        platform, kind, count, rates, experts, read=1e10 * count, copy=2e10, call=1e-5, memory_bytes=int(80e9)
    )


def test_what_was_saved_is_planned_with(own_table: Path) -> None:
    name, file = save_device([figures(1, 0.1), figures(4, 0.3)])
    assert (name, file) == (f"cpu-{cores()}", own_table)
    links = Links(3e9, 1e-5, 2e-6, 0.0, 0.0)
    assert save_links("cpu", "cpu", {4: readings(links, (2, 4)), 8: readings(links)}) == (name, file)
    device = parse_cluster("4").device
    assert device.name == name
    assert device.flops["float32"] == pytest.approx(0.3e12)
    assert device.expert_efficiency == pytest.approx(0.6)
    assert device.bandwidth == pytest.approx(4e10)
    assert device.link == pytest.approx(3e9, rel=1e-3)
    assert device.hop == pytest.approx(2e-6, rel=1e-2)
    assert "measured on" in device.source
    assert parse_cluster("1").device.flops["float32"] == pytest.approx(0.1e12)
    assert parse_cluster("1").device.link == 10e9  # of one device nothing was measured


def test_accelerators_keep_what_was_not_measured() -> None:
    assert save_device([figures(2, 0.8, "gpu", "NVIDIA H100 80GB HBM3")])[0] == "h100"
    device = parse_cluster("8xH100").device
    assert device.flops["float32"] == pytest.approx(0.4e12)
    assert device.matmul_efficiency == device.bandwidth_efficiency == device.expert_efficiency == 1.0
    assert device.bandwidth == pytest.approx(1e10)  # the copy, of one of two
    assert device.link == 450e9
    assert save_device([figures(1, 0.8, "gpu", "Abacus 3000")])[0] == "abacus-3000"
    assert parse_cluster("2xAbacus 3000").device.memory_bytes == int(80e9)


@pytest.mark.slow
def test_command(own_table: Path) -> None:
    home = {"XDG_CONFIG_HOME": str(own_table.parent.parent)}
    answer = run("bench", "device", "--devices", "2", "--save", "--json", **home)
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["devices"][0]["count"] == 2
    assert document["saved"]["entry"] == f"cpu-{cores()}"
    text = run("bench", "collectives", "--devices", "2", "--save", **home)
    assert text.returncode == 0, text.stderr
    assert "all-gather" in text.stdout
    assert "saved as" in text.stderr
    device = parse_cluster("2").device
    # The table keeps six digits.
    assert device.flops["float32"] == pytest.approx(document["devices"][0]["flops"]["float32"], rel=1e-5)
    assert device.link != 10e9
    refused = run("bench", "collectives", "--devices", "1", **home)
    assert refused.returncode == 5
    assert "at least 2 devices" in refused.stderr
