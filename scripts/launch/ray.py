#!/usr/bin/env python
"""Start a program as a job on the nodes of a Ray cluster, one process a node; needs `pip install ray`.

    python scripts/launch/ray.py --nodes 4 --gpus-per-node 8 -- python program.py ...

Ray places the processes, starts them and shows what they print; it takes no part in the job itself. See
docs/clusters.md.
"""

import argparse
import os
import secrets
import socket
import subprocess
import sys
from pathlib import Path

sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

OTHER_FAILED = 70  # this rank ended because another one did


def address() -> str:
    """This node's address and a port that is free here, for the coordinator."""
    import ray

    host = ray.util.get_node_ip_address()
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"{host}:{probe.getsockname()[1]}"


def places(nodes: int, coordinator: str) -> list[dict[str, str]]:
    """What each process is told of the job, in its environment."""
    common = {
        "SPMD_INFER_COORDINATOR": coordinator,
        "SPMD_INFER_NUM_PROCESSES": str(nodes),
        "SPMD_INFER_JOB_SECRET": secrets.token_hex(32),
    }
    return [common | {"SPMD_INFER_PROCESS_ID": str(rank)} for rank in range(nodes)]


def run(command: list[str], place: dict[str, str]) -> int:
    """Run one process to its end; returns its exit code, 128 and the signal where one ended it."""
    code = subprocess.run(command, env=os.environ | place, check=False).returncode
    return code if code >= 0 else 128 - code


def main() -> int:
    """Start the job, again where it fails; returns the exit code of the rank at fault."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options] -- command")
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--gpus-per-node", type=float, default=0)
    parser.add_argument("--cpus-per-node", type=float, default=1)
    parser.add_argument("--restarts", type=int, default=0, help="how often to start again a job that failed")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")  # each rank's lines are shown, alike or not; read on import
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    ray.init()
    needs = {"num_cpus": options.cpus_per_node, "num_gpus": options.gpus_per_node}
    bundle = {"CPU": options.cpus_per_node, "GPU": options.gpus_per_node}
    group = ray.util.placement_group([{k: v for k, v in bundle.items() if v}] * options.nodes, strategy="STRICT_SPREAD")
    on = [
        {"scheduling_strategy": PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank), **needs}
        for rank in range(options.nodes)
    ]
    for left in reversed(range(options.restarts + 1)):
        coordinator = ray.get(ray.remote(**on[0], max_retries=0)(address).remote())
        each = zip(on, places(options.nodes, coordinator), strict=True)
        jobs = [ray.remote(**where, max_retries=0)(run).remote(options.command, place) for where, place in each]
        codes = ray.get(jobs)
        code = next((code for code in codes if code not in (0, OTHER_FAILED)), max(codes))
        if code == 0:
            break
        print(f"exit codes by rank {codes}, {left} restarts left", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
