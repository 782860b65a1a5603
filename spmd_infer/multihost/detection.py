"""Which process of which job this is: arguments, then the user's variables, then the scheduler's, else one process."""

from __future__ import annotations

import os
from collections.abc import Mapping

from spmd_infer.errors import ClusterError
from spmd_infer.multihost.place import DEFAULT_PORT, MOST_PROCESSES, Place, parse_address, parse_int
from spmd_infer.multihost.schedulers import SCHEDULERS, Said, inner

COORDINATOR = "SPMD_INFER_COORDINATOR"
NUM_PROCESSES = "SPMD_INFER_NUM_PROCESSES"
PROCESS_ID = "SPMD_INFER_PROCESS_ID"
LOCAL_RANK = "SPMD_INFER_LOCAL_RANK"
LOCAL_SIZE = "SPMD_INFER_LOCAL_SIZE"
LOCAL_DEVICES = "SPMD_INFER_LOCAL_DEVICES"

RANK_PID = "SPMD_INFER_RANK_PID"
"""Set by a process that has joined a job, with its own process id: programs that it starts are not that rank."""


def detect(
    env: Mapping[str, str],
    *,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> Place:
    """This process's place in its job.

    Each of the three may come from an argument, its variable or the scheduler, in this order of belief.

    Args:
        env: the environment.
        coordinator: ``host:port`` of rank 0; the port may be left out.
        num_processes: how many processes the job has.
        process_id: this process's rank.

    Raises:
        ClusterError: something is missing, unreadable or contradictory; the message names the variable.
    """
    given = (coordinator, num_processes, process_id) != (None, None, None)
    if not given and env.get(RANK_PID, str(os.getpid())) != str(os.getpid()):
        return Place(0, 1, "", 0, f"started by the rank with process id {env[RANK_PID]}, not a rank itself")
    found = [said for scheduler in SCHEDULERS if (said := scheduler(env)) is not None]
    own = _own(env, coordinator, num_processes, process_id)
    complete = None not in (own.rank, own.size) and (own.host is not None or own.size == 1)
    said = None if complete else inner(found, env)
    if said is None and (own.rank, own.size, own.host) == (None, None, None):
        return Place(0, 1, "", 0, "no scheduler found")
    return _together(own, said)


def _own(env: Mapping[str, str], coordinator: str | None, size: int | None, rank: int | None) -> Said:
    """What arguments and the user's own variables say."""

    def number(name: str, argument: int | None, least: int, most: int) -> int | None:
        if argument is not None:
            return parse_int(str(argument), name.removeprefix("SPMD_INFER_").lower(), least, most)
        return parse_int(env[name], name, least, most) if env.get(name) else None

    address: tuple[str | None, int | None] = (None, None)
    if coordinator is not None:
        address = parse_address(coordinator, "coordinator")
    elif env.get(COORDINATOR):
        address = parse_address(env[COORDINATOR], COORDINATOR)
    names = {"rank": PROCESS_ID, "size": NUM_PROCESSES, "host": COORDINATOR}
    values = {
        "rank": number(PROCESS_ID, rank, 0, MOST_PROCESSES - 1),
        "size": number(NUM_PROCESSES, size, 1, MOST_PROCESSES),
        "host": address[0],
    }
    given = any(argument is not None for argument in (coordinator, size, rank))
    return Said(
        "arguments" if given else "SPMD_INFER_ variables",
        number(PROCESS_ID, rank, 0, MOST_PROCESSES - 1),
        number(NUM_PROCESSES, size, 1, MOST_PROCESSES),
        *address,
        local_rank=number(LOCAL_RANK, None, 0, MOST_PROCESSES),
        local_size=number(LOCAL_SIZE, None, 1, MOST_PROCESSES),
        missing={field: names[field] for field, value in values.items() if value is None},
    )


def _together(own: Said, said: Said | None) -> Place:
    """One place from what the user says and, where that leaves gaps, what the scheduler says."""
    rank = own.rank if own.rank is not None or said is None else said.rank
    size = own.size if own.size is not None or said is None else said.size
    host = own.host if own.host is not None or said is None else said.host
    if size == 1 and rank in (None, 0):
        return Place(0, 1, "", 0, own.source if said is None else said.source)
    for field, value in (("rank", rank), ("size", size), ("host", host)):
        if value is None:
            wanted = (own.missing or {})[field]
            by = said.source if said is not None else own.source
            theirs = (said.missing or {}).get(field, wanted) if said is not None else wanted
            also = f" ({theirs} is not set)" if theirs != wanted else ""
            raise ClusterError(f"{by} does not say the job's {_NAMES[field]}{also}: set {wanted}")
    assert rank is not None
    assert size is not None
    assert host is not None
    if rank >= size:
        raise ClusterError(
            f"rank {rank} in a job of {size} processes: ranks go from 0 to {size - 1} "
            f"({own.source if said is None else said.source}); see {PROCESS_ID} and {NUM_PROCESSES}"
        )
    port = own.port if own.host is not None or said is None else said.port
    local = own if own.local_size is not None or said is None else said
    # A port of the user's own wins over the scheduler's; the scheduler's is better than the one of every job.
    if own.host is not None and said is not None and own.port == DEFAULT_PORT and said.port is not None:
        port = said.port
    hosts = said.hosts if said is not None else ()
    source = own.source if said is None else said.source
    if said is not None and (own.rank, own.size, own.host) != (None, None, None):
        source += ", in part SPMD_INFER_ variables or arguments"
    return Place(
        rank, size, host, port or DEFAULT_PORT, source, local.local_rank, local.local_size,
        hosts if len(hosts) == size else (),
    )  # fmt: skip


_NAMES = {"rank": "rank of this process", "size": "number of processes", "host": "coordinator"}


def local_devices(place: Place, env: Mapping[str, str], visible: int) -> list[int] | None:
    """Which of this host's GPUs are this process's: an even share of them in rank order.

    Args:
        place: the process's place.
        env: the environment; ``SPMD_INFER_LOCAL_DEVICES`` such as ``0,1`` settles it.
        visible: how many GPUs the process sees.

    Returns:
        Indices among the visible GPUs; None for all of them.

    Raises:
        ClusterError: the variable cannot be read, or the GPUs cannot be shared evenly.
    """
    text = env.get(LOCAL_DEVICES)
    if text:
        return [parse_int(part, LOCAL_DEVICES, 0, 1023, whole=text) for part in text.split(",")]
    if visible <= 1 or place.local_size in (None, 1) or place.local_rank is None:
        return None
    assert place.local_size is not None
    if visible % place.local_size:
        raise ClusterError(
            f"{visible} GPUs cannot be shared evenly by {place.local_size} processes on one host: set "
            f"{LOCAL_DEVICES}, as in 0,1, for each, or start as many processes as GPUs, or one"
        )
    share = visible // place.local_size
    return list(range(place.local_rank * share, (place.local_rank + 1) * share))
