"""``plan`` without devices and weights: well-known models, configurations, the page, and mistakes."""

import json
import resource
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from tests.cli.test_commands import run


def test_a_model_far_larger_than_this_machine(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    answer = run(
        *("plan", "llama-3.1-405b", "--devices", "16xH200", "--hosts", "2", "--input", "2000", "--output", "200"),
        *("--html", str(page), "--json"),
    )
    assert answer.returncode == 0, answer.stderr
    document = json.loads(answer.stdout)
    assert document["devices"] == {"kind": "h200", "count": 16, "hosts": 2}
    chosen = document["candidates"][0]
    assert [phase["name"] for phase in chosen["phases"]] == ["prefill", "decode"]
    assert chosen["phases"][1]["times"] == 199
    assert chosen["memory_bytes"]["total"] < document["hardware"]["plannable_bytes"]
    text = " ".join(ET.fromstring(page.read_text("utf-8")).itertext())
    assert document["traffic"] in text


def test_a_plan_takes_less_than_three_seconds() -> None:
    command = ("plan", "llama-3.1-405b", "--devices", "16xH100", "--hosts", "2", "--input", "2000", "--output", "200")
    # Processor time, start and imports included, says nearly the same on a busy machine as the clock on a quiet one:
    # about 1.7 s. A crowded one slows that down too, so the best of three counts.
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*command).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if taken[-1] < 3:
            break
    assert min(taken) < 3, taken


def test_a_configuration_is_enough(tmp_path: Path) -> None:
    from spmd_infer.planning.known_models import find

    config = tmp_path / "config.json"
    config.write_text(json.dumps(find("smollm2-360m")))
    by_file = run("plan", str(config), "--devices", "4xL4", "--json")
    by_name = run("plan", "HuggingFaceTB/SmolLM2-360M-Instruct", "--devices", "4xL4", "--json")
    assert by_file.returncode == 0, by_file.stderr
    assert json.loads(by_file.stdout) == json.loads(by_name.stdout)


def test_hosts_are_those_that_are_usual_for_the_device() -> None:
    document = json.loads(run("plan", "smollm2-135m", "--devices", "16xv5e", "--json").stdout)
    assert document["devices"] == {"kind": "v5e", "count": 16, "hosts": 4}
    assert document["hardware"]["link_domain"] == 16


def test_what_is_approximated_is_among_the_notes() -> None:
    answer = run("plan", "palm-540b", "--devices", "64xv4", "--dtype", "bfloat16")
    assert answer.returncode == 0, answer.stderr
    assert "one after the other" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["llama-3.1-70b", "--devices", "1xH100"], 5, "bytes a device"),
        (["llama-3.1-70b", "--devices", "8xABC"], 5, "cannot read devices '8xABC'"),
        (["llama-3.1-70b", "--devices", "8xH100", "--hosts", "3"], 5, "cannot be spread evenly over 3 hosts"),
        (["llama-9", "--devices", "8xH100"], 3, "llama-9"),
        (["smollm2-135m", "--devices", "8", "--html", "absent/plan.html"], 4, "absent/plan.html: No such file"),
        (["smollm2-135m", "--devices", "8", "--objective", "fame"], 2, "'fame' is not one of"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes(arguments: list[str], code: int, message: str, tmp_path: Path) -> None:
    answer = run("plan", *arguments, cwd=tmp_path)
    assert answer.returncode == code, answer.stderr
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr


def test_a_hardware_table_of_ones_own(tmp_path: Path) -> None:
    table = tmp_path / "mine.toml"
    table.write_text('[box]\nlike = "h100"\nmemory_gb = 200\n')
    answer = run("plan", "llama-3.1-70b", "--devices", "1xbox", "--json", SPMD_INFER_HARDWARE=str(table))
    assert answer.returncode == 0, answer.stderr
    assert json.loads(answer.stdout)["hardware"]["memory_bytes"] == 200e9
    table.write_text('[box]\nlike = "h100"\nmemory_gb = "much"\n')
    answer = run("plan", "llama-3.1-70b", "--devices", "1xbox", SPMD_INFER_HARDWARE=str(table))
    assert answer.returncode == 5
    assert "[box] memory_gb = 'much': expected a number (GB)" in answer.stderr
