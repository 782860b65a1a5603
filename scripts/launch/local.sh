#!/usr/bin/env bash
# scripts/launch/local.sh PROCESSES DEVICES program.py ...
# A job of several processes with simulated devices on this machine, to try what will run on a cluster.
set -euo pipefail
exec spmd-infer launch --nprocs "$1" --devices-per-process "$2" -- "${@:3}"
