#!/usr/bin/env bash
# Everything to measure on a machine with NVIDIA GPUs: checks first, then figures. Nothing is downloaded.
#
#   PYTHON=python3 benchmarks/gpu.sh [FOLDER] [STEP...]     # results in FOLDER (gpu-results); all steps by default
#   TINY=1 benchmarks/gpu.sh FOLDER                         # the same steps in a small form, on any machine
#   WHEELS=folder benchmarks/gpu.sh FOLDER                  # with packages that the machine lacks, as wheels
#
# Steps: doctor device collectives tests attention generation prefill. Each has a time limit and goes on without the others.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-python3}
out=${1:-gpu-results}
shift || true
steps=${*:-doctor device collectives tests attention generation prefill}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
if [ -n "${WHEELS:-}" ]; then
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/packages" "$WHEELS"/*.whl || exit 1
    export PYTHONPATH=$PYTHONPATH:$out/packages
fi
needed="jax flax orbax.checkpoint ml_dtypes safetensors blake3 gguf tokenizers jinja2 llguidance PIL msgspec zmq yaml typer rich"
"$python" - $needed <<'EOF' || exit 1
import importlib.util
import sys

def there(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False

missing = [name for name in sys.argv[1:] if not there(name)]
if missing:
    sys.exit(f"{sys.executable} lacks {', '.join(missing)}: put their wheels into a folder and give it as WHEELS")
EOF

export SPMD_INFER_HARDWARE=$out/hardware.toml SPMD_INFER_COMPILE_CACHE=$out/cache
mkdir -m 700 -p "$out/cache"
touch "$out/hardware.toml" # named and missing, it would be an error; the first steps write it
# The peer takes GPU memory of its own, so JAX must not take nearly all of it at start.
export XLA_PYTHON_CLIENT_PREALLOCATE=false XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.6}
shape=(--shape llama-3.1-8b) platform=cuda tiny=()
decode=(--rows 1,32,128 --prompt 512 --new 64 --rounds 3) prompts=(--rows 1,4 --prompt 2048 --new 16 --rounds 3)
if [ -n "${TINY:-}" ]; then
    shape=(--tiny) platform=cpu tiny=(--tiny)
    decode=(--rows 1,4 --prompt 64 --new 8 --rounds 1) prompts=(--rows 1 --prompt 128 --new 2 --rounds 1)
fi
failed=0

step() { # name, seconds, command...
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    case " $steps " in *" $name "*) ;; *) return ;; esac
    echo "== $name"
    if ! timeout "$limit" "$@" >"$out/$name.txt" 2>&1; then
        failed=1
        echo "   failed or out of time; the end of $out/$name.txt:"
    fi
    tail -n 30 "$out/$name.txt"
    echo "   $((SECONDS - begin)) s"
}
cli() { "$python" -c "from spmd_infer.cli import main; main()" "$@"; }
export -f cli
export python

nvidia-smi >"$out/nvidia-smi.txt" 2>&1 || echo "no nvidia-smi"
step doctor 60 bash -c 'cli doctor'
step device 90 bash -c 'cli bench device --save'
step collectives 120 bash -c 'cli bench collectives --save'
# Products of float32 as such, not of TF32: the tests compare with float64.
step tests 300 env SPMD_INFER_TEST_PLATFORM=$platform JAX_DEFAULT_MATMUL_PRECISION=highest "$python" -m pytest -q \
    -p no:cacheprovider -W default tests/models/test_paged_attention.py tests/models/test_cuda_lowering.py \
    -k "TestEveryWay or TestMosaic or chunk or widened or TestOnTheGPU or lower"
step attention 240 "$python" benchmarks/attention.py "${tiny[@]}" --json "$out/attention.json"
step generation 540 "$python" benchmarks/generation.py "${shape[@]}" --variants bfloat16,fp8 --peers "${decode[@]}" \
    --json "$out/generation.json"
step prefill 400 "$python" benchmarks/generation.py "${shape[@]}" --variants bfloat16,fp8 --peers "${prompts[@]}" \
    --json "$out/prefill.json"
exit $failed
