"""What SLURM, Open MPI and Kubernetes tell a process by environment variables; functions of a mapping, nothing else.

Each function returns ``None`` where its scheduler did not start the process, and else what that scheduler says. Fields
that it does not say stay ``None``; ``detection`` fills them from the user's own variables, or says which is missing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from spmd_infer.errors import ClusterError
from spmd_infer.multihost.hostlist import expand_counts, expand_hosts
from spmd_infer.multihost.place import MOST_PROCESSES, parse_int

Environment = Mapping[str, str]

# Below the range that systems hand out to outgoing connections, which starts at 32768.
FIRST_PORT, PORTS = 12400, 16384


@dataclass(frozen=True)
class Said:
    """What a scheduler says of a process; attributes as of ``Place``, None where it does not say.

    Attributes:
        missing: for each field that is not said, the variable that would have said it.
    """

    source: str
    rank: int | None = None
    size: int | None = None
    host: str | None = None
    port: int | None = None
    local_rank: int | None = None
    local_size: int | None = None
    hosts: tuple[str, ...] = ()
    missing: Mapping[str, str] | None = None


def slurm(env: Environment) -> Said | None:
    """A task that ``srun`` started. The batch script itself, and a shell of ``salloc``, are not tasks."""
    if "SLURM_STEP_ID" not in env and "SLURM_STEP_NODELIST" not in env:
        return None
    names = {"rank": "SLURM_PROCID", "size": "SLURM_STEP_NUM_TASKS", "host": "SLURM_STEP_NODELIST"}
    missing = {field: name for field, name in names.items() if not env.get(name)}
    if "size" in missing and env.get("SLURM_NTASKS"):
        names["size"] = "SLURM_NTASKS"
        del missing["size"]
    rank = _int(env, names["rank"], 0, MOST_PROCESSES - 1)
    size = _int(env, names["size"], 1, MOST_PROCESSES)
    nodes = expand_hosts(env["SLURM_STEP_NODELIST"]) if env.get("SLURM_STEP_NODELIST") else []
    counts = expand_counts(env["SLURM_STEP_TASKS_PER_NODE"]) if env.get("SLURM_STEP_TASKS_PER_NODE") else []
    node = _int(env, "SLURM_NODEID", 0, MOST_PROCESSES)
    known = len(counts) == len(nodes) and sum(counts) == size
    hosts: tuple[str, ...] = ()
    if known and env.get("SLURM_DISTRIBUTION", "block").split(":")[0].split(",")[0] == "block":
        hosts = tuple(host for host, count in zip(nodes, counts, strict=True) for _ in range(count))
    reserved = re.match(r"[0-9]+", env.get("SLURM_STEP_RESV_PORTS", ""))
    job, step = (_int(env, name, 0, 2**32) or 0 for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    return Said(
        f"SLURM job {env.get('SLURM_JOB_ID', '?')}, step {env.get('SLURM_STEP_ID', '?')}",
        rank,
        size,
        nodes[0] if nodes else None,
        int(reserved[0]) if reserved else _port(f"{job}.{step}"),
        _int(env, "SLURM_LOCALID", 0, MOST_PROCESSES),
        counts[node] if known and node is not None and node < len(counts) else None,
        hosts,
        missing,
    )


def open_mpi(env: Environment) -> Said | None:
    """A process of Open MPI's ``mpirun``, or of another launcher that speaks PMIx."""
    if "OMPI_COMM_WORLD_RANK" not in env and "OMPI_COMM_WORLD_SIZE" not in env and "PMIX_RANK" not in env:
        return None
    names = {"rank": "OMPI_COMM_WORLD_RANK", "size": "OMPI_COMM_WORLD_SIZE"}
    if not env.get("OMPI_COMM_WORLD_RANK") and env.get("PMIX_RANK"):
        names["rank"] = "PMIX_RANK"
    missing = {field: name for field, name in names.items() if not env.get(name)}
    size = _int(env, names["size"], 1, MOST_PROCESSES)
    local_size = _int(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1, MOST_PROCESSES)
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.search(r"tcp://([^,:;]+)|tcp6://\[([^\],]+)", uri)
    host: str | None = None
    if size is not None and local_size == size:
        host = "127.0.0.1"
    elif env.get("SLURM_JOB_NODELIST"):
        host = expand_hosts(env["SLURM_JOB_NODELIST"])[0]
    elif env.get("LSB_MCPU_HOSTS"):
        host = env["LSB_MCPU_HOSTS"].split()[0]
    elif address is not None:
        host = address[1] or address[2]
    else:
        missing["host"] = "OMPI_MCA_orte_hnp_uri"
    number = uri.partition(".")[0] or env.get("PMIX_NAMESPACE", "")
    return Said(
        "Open MPI" if "rank" in names and names["rank"].startswith("OMPI") else "PMIx",
        _int(env, names["rank"], 0, MOST_PROCESSES - 1),
        size,
        host,
        _port(number) if number else None,
        _int(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0, MOST_PROCESSES),
        local_size,
        missing=missing,
    )


def kubernetes(env: Environment) -> Said | None:
    """A pod of a LeaderWorkerSet, of a JobSet or of an indexed Job.

    Kubernetes tells a pod of a Job only its index; the manifests in ``scripts/launch`` add the rest as
    ``SPMD_INFER_COORDINATOR`` and ``SPMD_INFER_NUM_PROCESSES``.
    """
    workers = {"rank": "LWS_WORKER_INDEX", "size": "LWS_GROUP_SIZE", "host": "LWS_LEADER_ADDRESS"}
    if any(name in env for name in workers.values()):
        return Said(
            "Kubernetes LeaderWorkerSet",
            _int(env, workers["rank"], 0, MOST_PROCESSES - 1),
            _int(env, workers["size"], 1, MOST_PROCESSES),
            env.get("LWS_LEADER_ADDRESS") or None,
            missing={field: name for field, name in workers.items() if not env.get(name)},
        )
    if "JOB_COMPLETION_INDEX" not in env:
        return None
    return Said(
        "Kubernetes JobSet" if env.get("JOBSET_NAME") else "Kubernetes indexed Job",
        _int(env, "JOB_COMPLETION_INDEX", 0, MOST_PROCESSES - 1),
        missing={
            field: variable
            for field, variable in (
                ("rank", "JOB_COMPLETION_INDEX"),
                ("size", "SPMD_INFER_NUM_PROCESSES"),
                ("host", "SPMD_INFER_COORDINATOR"),
            )
            if not env.get(variable)
        },
    )


SCHEDULERS: tuple[Callable[[Environment], Said | None], ...] = (slurm, open_mpi, kubernetes)
"""In the order in which they are believed."""


def _int(env: Environment, name: str, least: int, most: int) -> int | None:
    return parse_int(env[name], name, least, most) if env.get(name) else None


def _port(identity: str) -> int:
    """The same port for all processes of a job, and rarely that of another job."""
    return FIRST_PORT + zlib.crc32(identity.encode()) % PORTS


def inner(said: list[Said], env: Environment) -> Said | None:
    """Which of several schedulers that all left their variables started this very process.

    ``mpirun`` inside a SLURM allocation leaves both: its helpers were started by ``srun``, so SLURM's rank is theirs.

    Raises:
        ClusterError: two of them say different things, and neither is known to run inside the other.
    """
    if not said:
        return None
    first = said[0]
    for other in said[1:]:
        same = all(
            None in (mine, theirs) or mine == theirs
            for mine, theirs in ((first.rank, other.rank), (first.size, other.size))
        )
        if same:
            continue
        if first.source.startswith("SLURM") and other.source == "Open MPI" and "OMPI_MCA_ess_base_jobid" in env:
            return other
        raise ClusterError(
            f"{first.source} says rank {first.rank} of {first.size}, but {other.source} says rank {other.rank} of "
            f"{other.size}; say which with SPMD_INFER_PROCESS_ID, SPMD_INFER_NUM_PROCESSES and SPMD_INFER_COORDINATOR"
        )
    return first
