#!/usr/bin/env bash
# scripts/launch/mpirun.sh -n 4 [more options of mpirun] -- python program.py ...
# For one process a node: -n NODES --map-by ppr:1:node --hostfile FILE. See docs/clusters.md.
set -euo pipefail

export SPMD_INFER_JOB_SECRET=${SPMD_INFER_JOB_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}

options=()
while [ "${1:-}" ] && [ "$1" != -- ]; do
    options+=("$1")
    shift
done
# Binding each process to one core, as mpirun does by default, would leave a host's other cores idle.
exec mpirun --bind-to none --tag-output -x SPMD_INFER_JOB_SECRET "${options[@]}" "${@:2}"
