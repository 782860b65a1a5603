#!/usr/bin/env bash
# Everything to measure on a machine with GPUs, in one go: checks first, then figures. Results go to the folder given
# (default: gpu-results). Runs in whatever Python has jax with CUDA: PYTHON=python3 benchmarks/gpu.sh results
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-gpu-results}
mkdir -p "$out"
export PYTHONPATH=$PWD XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
export SPMD_INFER_HARDWARE=$PWD/$out/hardware.toml
failed=0

step() { # name, seconds, command...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    if ! timeout "$limit" "$@" >"$out/$name.txt" 2>&1; then
        failed=1
        echo "   failed or out of time; the end of $out/$name.txt:"
        tail -n 5 "$out/$name.txt"
    else
        tail -n 15 "$out/$name.txt"
    fi
}

nvidia-smi >"$out/nvidia-smi.txt" 2>&1 || echo "no nvidia-smi"
step doctor 60 "$python" -c "from spmd_infer.cli import main; main()" doctor
step bench-device 90 "$python" -c "from spmd_infer.cli import main; main()" bench device
step bench-collectives 120 "$python" -c "from spmd_infer.cli import main; main()" bench collectives
step tests 300 env SPMD_INFER_TEST_PLATFORM=cuda "$python" -m pytest -q -x -p no:cacheprovider \
    tests/models/test_paged_attention.py tests/generation/test_cache.py tests/test_engine.py
step generation-8b-bf16 400 "$python" benchmarks/generation.py --shape llama-3.1-8b --variants bfloat16 \
    --rows 1,32,128 --prompt 512 --new 64 --rounds 3 --json "$out/generation-8b-bf16.json"
step prefill-8b-bf16 300 "$python" benchmarks/generation.py --shape llama-3.1-8b --variants bfloat16 \
    --rows 1,4 --prompt 2048 --new 16 --rounds 3 --json "$out/prefill-8b-bf16.json"
exit $failed
