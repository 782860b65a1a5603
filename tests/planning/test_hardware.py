"""The table of devices: its figures, the user's own over it, and what is refused in it."""

from pathlib import Path

import jax
import pytest

from spmd_infer.errors import PlanError
from spmd_infer.planning import hardware
from spmd_infer.planning.hardware import found_cluster, hardware_table, parse_cluster
from spmd_infer.planning.hardware_file import read_rows, read_user_rows, write_user_row


@pytest.fixture(autouse=True)
def no_file_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SPMD_INFER_HARDWARE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "spmd-infer" / "hardware.toml"


def own(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.mark.parametrize(
    ("text", "name", "bf16", "bandwidth"),
    [
        ("16xH100", "h100", 990e12, 3.35e12),
        ("8xh100-pcie", "h100-pcie", 756e12, 2.0e12),
        ("8x H100 PCIe", "h100-pcie", 756e12, 2.0e12),
        ("1xH200", "h200", 990e12, 4.8e12),
        ("72xGB200", "gb200", 2500e12, 8e12),
        ("8xGB200-NVL72", "gb200", 2500e12, 8e12),
        ("64xV4", "v4", 275e12, 1.2e12),
        ("16xv5e", "v5e", 197e12, 0.82e12),
        ("8x7x", "v7x", 2307e12, 7.4e12),
        ("8xA100", "a100-80gb", 312e12, 2.04e12),
        ("2xRTX_4090", "rtx4090", 165e12, 1.0e12),
    ],
)
def test_names_in_any_case_and_their_figures(text: str, name: str, bf16: float, bandwidth: float) -> None:
    cluster = parse_cluster(text)
    assert cluster.device.name == name
    assert cluster.device.peak("bfloat16") == bf16
    assert cluster.device.bandwidth == bandwidth
    assert cluster.count == int(text.split("x", maxsplit=1)[0])


@pytest.mark.parametrize(
    ("text", "hosts", "per_host", "domain"),
    [
        ("16xH100", 2, 8, 8),
        ("12xH100", 2, 6, 6),
        ("11xH100", 11, 1, 1),
        ("4xH100", 1, 4, 4),
        ("144xGB200", 36, 4, 72),
        ("16xv5e", 4, 4, 16),
        ("64xv4", 16, 4, 64),
        ("64", 1, 64, 64),
    ],
)
def test_hosts_and_link_domains(text: str, hosts: int, per_host: int, domain: int) -> None:
    cluster = parse_cluster(text)
    assert (cluster.hosts, cluster.per_host, cluster.domain) == (hosts, per_host, domain)
    assert parse_cluster("16xH100", hosts=1).domain == 16


def test_collectives_take_bandwidth_by_size() -> None:
    device = parse_cluster("8xH100").device
    assert device.collective_bandwidth(58e6) == pytest.approx(150e9, rel=0.02)  # the published measurement
    assert device.collective_bandwidth(10e9) > 0.88 * 370e9
    assert device.collective_bandwidth(125e6) == pytest.approx(450e9 * 0.82 / 2)
    assert device.collective_bandwidth(1e9, leaves_domain=True) == pytest.approx(50e9 * 0.82)
    assert parse_cluster("8xv5e").device.collective_bandwidth(10e6) > 0.94 * 0.9 * 200e9
    assert device.collective_latency(8) == pytest.approx(16e-6)
    assert device.collective_latency(16, hosts=2) > device.collective_latency(16)


def test_every_row_is_whole() -> None:
    for name, (device, names) in hardware_table().items():
        assert names, name
        assert device.source, name
        assert 0 < device.bandwidth_efficiency <= 1, name
        assert device.peak("float32") <= device.peak("bfloat16") <= max(device.peak("int8"), device.peak("bfloat16"))
        assert device.domain == 0 or device.domain > device.per_host, name


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("Abacus", None),
    ],
)
def test_drivers_names_find_the_longest_match(kind: str, name: str | None) -> None:
    assert hardware.entry_of(kind, read_rows()) == name


def test_the_users_file_changes_and_adds(no_file_of_the_user: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hardware_table()["h100"][0]
    own(
        no_file_of_the_user,
        '[h100]\nmemory_tb_s = 3.0\n[mine]\nlike = "h200"\nmemory_gb = 100\naliases = ["box"]\nmatch = ["Box 1"]\n',
    )
    table = hardware_table()
    assert table["h100"][0].bandwidth == 3.0e12
    assert table["h100"][0].flops == before.flops
    assert parse_cluster("4xbox").device.memory_bytes == int(100e9)
    assert hardware.entry_of("Box 1 SXM", read_rows()) == "mine"

    elsewhere = no_file_of_the_user.parent / "other.toml"
    elsewhere.write_text("[h100]\nmemory_gb = 94\n")
    monkeypatch.setenv("SPMD_INFER_HARDWARE", str(elsewhere))
    assert parse_cluster("1xh100").device.memory_bytes == int(94e9)
    with pytest.raises(PlanError, match="cannot read devices"):
        parse_cluster("4xbox")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[h100]\nbf16 = "fast"\n', r"\[h100\] bf16 = 'fast': expected a number \(TFLOP/s\)"),
        ("[h100]\nbf16 = true\n", r"bf16 = True: expected a number"),
        ("[h100]\nmemory_tb_s = 0\n", r"memory_tb_s = 0: expected a number \(TB/s\)"),
        ("[h100]\nlatency_us = -1\n", r"latency_us = -1: expected a number \(microseconds\)"),
        ("[h100]\nper_host = 2.5\n", r"per_host = 2.5: expected a whole number \(devices"),
        ("[h100]\nmatmul_efficiency = 80\n", r"matmul_efficiency = 80: expected a number \(a part of 1\)"),
        ("[h100]\nspeed = 1\n", r"speed: there is no such key; keys are bf16, "),
        ('[h100]\nmatch = "H100"\n', r"match = 'H100': expected a list of names"),
        ("[new]\nbf16 = 1\n", r"\[new\] has no f32 \(TFLOP/s\); give it, or start from a known device"),
        ('[new]\nlike = "old"\n', r"\[new\] is like 'old', which no entry"),
        ("bf16 = 1\n", "'bf16' stands outside a device"),
        ("[h100\n", "is not TOML"),
        ("[cpu.at.many]\nf32 = 1\n", "at.many: expected a number of simulated devices"),
        ("[cpu.at.2]\nf64 = 1\n", "there is no rate 'f64'"),
        ("[cpu.at.2]\nf32 = 0\n", r"f32 = 0: expected a number \(TFLOP/s\)"),
    ],
)
def test_mistakes_in_it_are_named(text: str, message: str, no_file_of_the_user: Path) -> None:
    own(no_file_of_the_user, text)
    with pytest.raises(PlanError, match=message) as caught:
        hardware_table()
    assert str(no_file_of_the_user) in str(caught.value)


def test_a_file_that_was_asked_for_must_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SPMD_INFER_HARDWARE", str(tmp_path / "absent.toml"))
    with pytest.raises(PlanError, match=r"SPMD_INFER_HARDWARE names .*absent.toml, which does not exist"):
        parse_cluster("8xH100")


def test_calibrated_entries_are_kept_and_used(no_file_of_the_user: Path) -> None:
    own(no_file_of_the_user, "[h100]\nmemory_gb = 94\n")
    row = {
        "like": "cpu",
        "cores": hardware.cores(),
        "shared": True,
        "bf16": 0.5,
        "source": 'measured "here"',
        "at": {"1": {"f32": 0.1, "memory_tb_s": 0.01}, "4": {"f32": 0.2, "memory_tb_s": 0.02}},
    }
    assert write_user_row("cpu-here", row) == no_file_of_the_user
    assert write_user_row("cpu-here", row | {"bf16": 0.6}) == no_file_of_the_user
    assert read_user_rows(no_file_of_the_user)["h100"] == {"memory_gb": 94}
    assert [parse_cluster(n).device.flops["float32"] for n in ("1", "2", "4", "8")] == [0.1e12, 0.1e12, 0.2e12, 0.2e12]
    found = found_cluster(jax.devices())
    assert found.device.name == "cpu-here"
    assert found.device.source == 'measured "here"'
    assert found.device.bandwidth == 0.02e12
    assert found.device.flops["bfloat16"] == 0.6e12
