"""Cases that others have measured and published: the plan must come to the same choice, or near the same figure."""

import time

import pytest

import spmd_infer as si
from spmd_infer.errors import DoesNotFitError
from spmd_infer.planning.estimates import Candidate, PhaseEstimate

TEN_MS = 1e-2


def step(candidate: Candidate, name: str) -> PhaseEstimate:
    return next(phase for phase in candidate.phases if phase.name == name)


def one_d(plan: si.MeshPlan, mesh: str) -> Candidate:
    return next(c for c in plan.candidates if str(c.mesh) == mesh and c.layout == "1-D weight-stationary")


def test_llama_8b_decodes_at_the_speed_of_an_h200s_memory() -> None:
    # 16 GB of weights at 4.8 TB/s are 300 tokens/s at best; NIM on a GH200 reaches 166.
    plan = si.plan("llama-3.1-8b", devices="1xH200", batch=1, length=128, output=128)
    assert 245 < 1 / step(plan.chosen, "decode").time.total < 320


def test_llama_70b_on_16_v5e_wants_tp16_rather_than_dp2_tp8() -> None:
    # jax-llm-examples, Llama-3.1-70B int8, batch 8: 159 tokens/s a sequence with TP16, 84 with DP2 x TP8.
    plan = si.plan("llama-3.1-70b", devices="16xv5e", batch=8, length=128, output=128, dtype="int8")
    tp16 = step(one_d(plan, "data=1,model=16"), "decode").time.total
    dp2 = step(one_d(plan, "data=2,model=8"), "decode").time.total
    assert tp16 < dp2
    # Between the roofline of the weights alone and what was measured, within a factor of two of it.
    assert 70e9 / 16 / 0.82e12 < tp16 < 2 / 159
    assert 70e9 / 8 / 0.82e12 < dp2 < 2 / 84


def test_llama_70b_refuses_one_h100_and_says_what_would_fit() -> None:
    with pytest.raises(DoesNotFitError) as caught:
        si.plan("llama-3.1-70b", devices="1xH100", batch=1)
    error = caught.value
    assert error.available_bytes == 72_000_000_000
    assert 141_000_000_000 < error.needed_bytes < 142_000_000_000
    assert f"needs {error.needed_bytes:,} bytes" in str(error)
    assert "use at least 2 devices" in str(error)
    assert si.plan("llama-3.1-70b", devices="2xH100", batch=1).mesh.shape["model"] == 2
    assert si.plan("llama-3.1-70b", devices="1xH200", batch=1, dtype="int8").mesh.size == 1


def test_llama_405b_in_bfloat16_needs_two_hosts_of_h100_and_in_fp8_one() -> None:
    # "The Llama 3 Herd of Models" (2024), section 6: 405B in BF16 does not fit 8 H100, and runs on 16 of two machines;
    # quantised to FP8 it runs on the 8 of one.
    with pytest.raises(DoesNotFitError):
        si.plan("llama-3.1-405b", devices="8xH100", batch=1, length=4096, output=256)
    assert si.plan("llama-3.1-405b", devices="16xH100", hosts=2, batch=1, length=4096, output=256).mesh.size == 16
    assert si.plan("llama-3.1-405b", devices="8xH100", batch=1, length=4096, output=256, dtype="fp8").mesh.size == 8


def test_palm_540b_decodes_with_2d_weights_and_prefills_with_gathered_ones() -> None:
    # Pope et al. 2022, 64 TPU v4: 29 ms a token in int8 at low batch with the 2-D weight-stationary layout, and the
    # weight-gathered one for large prefills.
    decode = si.plan("palm-540b", devices="64xv4", batch=64, length=128, output=512, dtype="int8")
    assert step(decode.chosen, "decode").layout == "2-D weight-stationary"
    assert decode.mesh.shape["data"] > 1
    assert decode.mesh.shape["model"] > 1
    roofline = 540e9 / 64 / 1.2e12
    assert roofline < step(decode.chosen, "decode").time.total < 29e-3
    prefill = si.plan("palm-540b", devices="64xv4", batch=64, length=2048, output=1, dtype="int8")
    assert step(prefill.chosen, "prefill").layout == "weight-gathered"


def test_few_rows_of_a_large_model_are_split_over_the_model_axis() -> None:
    # Megatron-LM: tensor parallelism inside a host's links, data parallelism across hosts.
    plan = si.plan("llama-3.1-70b", devices="16xH100", hosts=2, batch=64, length=2000, output=200)
    assert plan.mesh.shape["model"] <= 8


def test_objectives_and_limits() -> None:
    fast = si.plan("llama-3.1-8b", devices="8xH100", batch=8, length=512, output=128)
    cheap = si.plan("llama-3.1-8b", devices="8xH100", batch=8, length=512, output=128, objective="cost")
    assert cheap.mesh.size < fast.mesh.size
    many = si.plan("llama-3.1-8b", devices="8xH100", length=512, output=128, objective="throughput")
    assert many.chosen.rows > 8
    assert many.chosen.most_rows >= many.chosen.rows
    limited = si.plan("llama-3.1-8b", devices="8xH100", batch=8, length=512, output=128, itl_limit=1e-2)
    for candidate in limited.candidates:
        if candidate.rejected and "time between tokens" in candidate.rejected:
            assert step(candidate, "decode").time.total > TEN_MS
    assert step(limited.chosen, "decode").time.total <= TEN_MS


def test_rows_that_fit_really_fit() -> None:
    plan = si.plan("llama-3.1-8b", devices="1xH100", batch=4, length=2048, output=64)
    rows = plan.chosen.most_rows
    assert si.plan("llama-3.1-8b", devices="1xH100", batch=rows, length=2048, output=64).mesh.size == 1
    with pytest.raises(DoesNotFitError):
        si.plan("llama-3.1-8b", devices="1xH100", batch=int(rows * 1.2), length=2048, output=64)


@pytest.mark.slow
def test_the_largest_model_is_planned_in_seconds() -> None:
    si.plan("llama-3.1-8b", devices="1xH200")
    started = time.perf_counter()
    plan = si.plan("llama-3.1-405b", devices="16xH100", hosts=2, batch=8, length=2000, output=200)
    # 3 s on a quiet machine; a loaded one may take longer, tracing all 126 layers would take ten times that.
    assert time.perf_counter() - started < 10
    assert plan.mesh.size == 16
