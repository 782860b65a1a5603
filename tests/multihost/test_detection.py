"""Who this process is, from the variables that each scheduler sets: whole, in part, one inside another."""

import os
import re
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spmd_infer.errors import ClusterError
from spmd_infer.multihost.detection import RANK_PID, detect, local_devices
from spmd_infer.multihost.hostlist import expand_counts, expand_hosts
from spmd_infer.multihost.place import DEFAULT_PORT, Place, parse_address
from spmd_infer.multihost.schedulers import FIRST_PORT, PORTS

# As srun of SLURM 22.05 sets them for the third of four tasks on two nodes (those that matter, and some that do not).
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
    "SLURM_JOB_NODELIST": "node[07-08]",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_DISTRIBUTION": "block",
}
# In the batch script, and in a shell of salloc: no step, though SLURM_PROCID is there.
SLURM_BATCH = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NODELIST": "node[07-08]",
}
# As mpirun of Open MPI 4.1.4 sets them for the second of two processes on one host.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_ess_base_jobid": "702021633",
    "OMPI_MCA_orte_hnp_uri": "702021632.0;tcp://192.0.2.2,10.1.0.2:32879;tcp6://[fd00::2]:50635",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "702021633",
}
LWS = {"LWS_LEADER_ADDRESS": "llm-0.llm.default", "LWS_GROUP_SIZE": "4", "LWS_WORKER_INDEX": "3"}
JOBSET = {
    "JOB_COMPLETION_INDEX": "1",
    "JOBSET_NAME": "infer",
    "SPMD_INFER_COORDINATOR": "infer-workers-0-0.infer",
    "SPMD_INFER_NUM_PROCESSES": "4",
}
OWN = {"SPMD_INFER_COORDINATOR": "h:99", "SPMD_INFER_NUM_PROCESSES": "8", "SPMD_INFER_PROCESS_ID": "5"}


def facts(place: Place) -> tuple[int, int, str, int]:
    return place.rank, place.size, place.host, place.port


def test_slurm() -> None:
    place = detect(SLURM)
    assert (place.rank, place.size, place.host) == (2, 4, "node07")
    assert FIRST_PORT <= place.port < FIRST_PORT + PORTS
    assert place.hosts == ("node07", "node07", "node08", "node08")
    assert (place.local_rank, place.local_size) == (0, 2)
    assert place.source == "SLURM job 4711, step 0"
    assert "rank 2 of 4, number 0 of 2 on its host, coordinator node07:" in place.describe()
    others = {rank: detect(SLURM | {"SLURM_PROCID": str(rank)}).coordinator for rank in range(4)}
    assert len(set(others.values())) == 1  # all meet at one address
    assert detect(SLURM | {"SLURM_STEP_ID": "1"}).port != place.port
    assert detect(SLURM | {"SLURM_STEP_RESV_PORTS": "15001-15004"}).port == 15001
    assert detect(SLURM | {"SLURM_DISTRIBUTION": "cyclic"}).hosts == ()


def test_inside_a_batch_script_nothing_was_started_in_parallel() -> None:
    assert detect(SLURM_BATCH).size == 1


def test_open_mpi() -> None:
    place = detect(OPEN_MPI)
    assert (place.rank, place.size, place.host, place.source) == (1, 2, "127.0.0.1", "Open MPI")
    assert (place.local_rank, place.local_size) == (1, 2)
    spread = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    assert detect(spread).host == "192.0.2.2"
    six = detect(spread | {"OMPI_MCA_orte_hnp_uri": "702021632.0;tcp6://[fd00::2]:50635"})
    assert (six.host, six.coordinator) == ("fd00::2", f"[fd00::2]:{six.port}")
    five = {k: v for k, v in spread.items() if k != "OMPI_MCA_orte_hnp_uri"}  # Open MPI 5 does not set it
    with pytest.raises(ClusterError, match=r"Open MPI does not say the job's coordinator .*set SPMD_INFER_COORDINATOR"):
        detect(five)
    assert facts(detect(five | {"SPMD_INFER_COORDINATOR": "a:5"})) == (1, 2, "a", 5)


def test_open_mpi_inside_slurm() -> None:
    """mpirun starts its helpers with srun, so their SLURM rank is in every process."""
    inside = SLURM | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"} | OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    place = detect(inside)
    assert (place.rank, place.size, place.host, place.source) == (1, 2, "node07", "Open MPI")


def test_srun_with_pmix() -> None:
    both = SLURM | {"PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.4711.0"}
    assert detect(both).source == "SLURM job 4711, step 0"


def test_kubernetes() -> None:
    assert facts(detect(LWS)) == (3, 4, "llm-0.llm.default", DEFAULT_PORT)
    assert facts(detect(JOBSET)) == (1, 4, "infer-workers-0-0.infer", DEFAULT_PORT)
    assert detect(JOBSET).source.startswith("Kubernetes JobSet")
    job = {"JOB_COMPLETION_INDEX": "2", "SPMD_INFER_COORDINATOR": "j-0.j:7000", "SPMD_INFER_NUM_PROCESSES": "3"}
    assert facts(detect(job)) == (2, 3, "j-0.j", 7000)
    with pytest.raises(
        ClusterError, match=r"indexed Job does not say the job's number of processes.*SPMD_INFER_NUM_PRO"
    ):
        detect({"JOB_COMPLETION_INDEX": "2"})


def test_arguments_then_own_variables_then_the_scheduler() -> None:
    assert facts(detect(SLURM | OWN)) == (5, 8, "h", 99)
    assert facts(detect(SLURM | OWN, coordinator="g:1", num_processes=3, process_id=1)) == (1, 3, "g", 1)
    assert facts(detect(SLURM | {"SPMD_INFER_COORDINATOR": "g:1"})) == (2, 4, "g", 1)
    # Host alone: the scheduler's port, which differs from job to job.
    assert facts(detect(SLURM | {"SPMD_INFER_COORDINATOR": "g"})) == (2, 4, "g", detect(SLURM).port)


def test_one_process() -> None:
    assert detect({}).size == 1
    assert detect({"SPMD_INFER_NUM_PROCESSES": "1"}).size == 1
    assert detect({}).describe() == "one process (no scheduler found)"


def test_what_a_rank_starts_is_no_rank() -> None:
    assert detect(SLURM | {RANK_PID: "1"}).size == 1
    assert detect(SLURM | {RANK_PID: str(os.getpid())}).size == 4


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (SLURM | {"SLURM_PROCID": "two"}, r"SLURM_PROCID='two': expected a whole number from 0 to"),
        (SLURM | {"SLURM_PROCID": "4"}, r"rank 4 in a job of 4 processes: ranks go from 0 to 3 \(SLURM job 4711"),
        (SLURM | {"SLURM_STEP_NODELIST": "node[7-"}, r"cannot read the node list 'node\[7-' from character 1 on"),
        (SLURM | {"SLURM_STEP_NODELIST": "node[8-7]"}, r"range '8-7' in the node list .* is empty"),
        ({k: v for k, v in SLURM.items() if k != "SLURM_PROCID"}, r"SLURM_PROCID is not set\): set SPMD_INFER_PRO"),
        ({"PMIX_RANK": "1"}, r"PMIx does not say the job's number of processes .OMPI_COMM_WORLD_SIZE is not"),
        ({"SPMD_INFER_PROCESS_ID": "1"}, r"does not say the job's number of processes: set SPMD_INFER_NUM_PROC"),
        ({"SPMD_INFER_NUM_PROCESSES": "2"}, r"say the job's rank of this process: set SPMD_INFER_PROCESS_ID"),
        ({"SPMD_INFER_NUM_PROCESSES": "2", "SPMD_INFER_PROCESS_ID": "0"}, r"set SPMD_INFER_COORDINATOR"),
        (OWN | {"SPMD_INFER_PROCESS_ID": "8"}, r"rank 8 in a job of 8 processes"),
        (OWN | {"SPMD_INFER_PROCESS_ID": "-1"}, r"SPMD_INFER_PROCESS_ID='-1': expected a whole number"),
        (OWN | {"SPMD_INFER_NUM_PROCESSES": "0"}, r"SPMD_INFER_NUM_PROCESSES='0': expected a whole number from 1"),
        (OWN | {"SPMD_INFER_COORDINATOR": "h:p"}, r"SPMD_INFER_COORDINATOR='h:p': .* from 1 to 65535, got 'p'"),
        (OWN | {"SPMD_INFER_COORDINATOR": "http://h:1"}, r"SPMD_INFER_COORDINATOR='http://h:1'"),
        (SLURM | LWS, r"SLURM job 4711, step 0 says rank 2 of 4, but Kubernetes LeaderWorkerSet says rank 3 of 4"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(env: Mapping[str, str], message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        detect(env)


@given(st.sampled_from([SLURM, OPEN_MPI, LWS, JOBSET, OWN]), st.data())
def test_any_part_of_a_schedulers_variables_gives_a_place_or_names_a_variable(
    whole: dict[str, str], data: st.DataObject
) -> None:
    kept = data.draw(st.sets(st.sampled_from(sorted(whole))))
    part = {name: whole[name] for name in kept}
    full = detect(whole)
    wrong = ""
    try:
        place = detect(part)
    except ClusterError as error:
        place, wrong = full, str(error)
    assert not wrong or re.search(r"\b(SPMD_INFER|SLURM|OMPI|PMIX|LWS|JOB)_[A-Z_]+", wrong)
    # Never another rank's place: either one process on its own, or just what the whole says.
    assert place.size == 1 or (place.rank, place.size) == (full.rank, full.size)


@given(st.dictionaries(st.sampled_from([*SLURM, *OPEN_MPI, *LWS, *OWN]), st.text(max_size=30)))
def test_no_values_make_it_fail_otherwise(env: dict[str, str]) -> None:
    try:
        place = detect(env)
    except ClusterError:
        return
    assert 0 <= place.rank < place.size


def test_host_lists() -> None:
    assert expand_hosts("a") == ["a"]
    assert expand_hosts("n[1-3,07,10-11]x,login") == ["n1x", "n2x", "n3x", "n07x", "n10x", "n11x", "login"]
    assert expand_hosts("r[1-2]n[08-09]") == ["r1n08", "r1n09", "r2n08", "r2n09"]
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    for wrong in ("", "a,", ",a", "n[1-2", "n]", "n[a-b]", "n[1--2]", "n[1-99999999]"):
        with pytest.raises(ClusterError):
            expand_hosts(wrong)


@given(
    st.lists(st.tuples(st.sampled_from(["n", "gpu-"]), st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=5)
)
def test_host_lists_of_ranges(parts: list[tuple[str, int, int]]) -> None:
    text = ",".join(f"{name}[{first:03d}-{first + more:03d}]" for name, first, more in parts)
    assert expand_hosts(text) == [f"{n}{i:03d}" for n, first, more in parts for i in range(first, first + more + 1)]


def test_addresses() -> None:
    assert parse_address("h", "X") == ("h", DEFAULT_PORT)
    assert parse_address("10.0.0.1:80", "X") == ("10.0.0.1", 80)
    assert parse_address("[::1]:80", "X") == ("::1", 80)
    assert parse_address("fd00::2", "X") == ("fd00::2", DEFAULT_PORT)
    for wrong in ("", ":80", "h:", "h:0", "h:65536", "[::1", "[::1]80", "a b:1"):
        with pytest.raises(ClusterError, match="X="):
            parse_address(wrong, "X")


def test_gpus_are_shared_evenly() -> None:
    place = detect(SLURM | {"SLURM_LOCALID": "1"})
    assert local_devices(place, {}, 8) == [4, 5, 6, 7]
    assert local_devices(place, {}, 1) is None  # the scheduler has shared them out already
    assert local_devices(detect(LWS), {}, 8) is None
    assert local_devices(place, {"SPMD_INFER_LOCAL_DEVICES": "0,3"}, 8) == [0, 3]
    with pytest.raises(ClusterError, match="3 GPUs cannot be shared evenly by 2 processes"):
        local_devices(place, {}, 3)
