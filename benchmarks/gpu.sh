#!/bin/sh
# Makes all checks that need a GPU on one GPU, in at most 9 minutes, and then stops:
#
#     benchmarks/gpu.sh                              # JSON into benchmarks/results
#     OUT=folder PYTHON=python3.12 benchmarks/gpu.sh
#
# Each part has a time limit; if one fails, the others still run. A part that needs a GPU is left out without
# one. gpu_PART.json holds the command, the exit code (124: out of time) and the last lines of the output.
set -u
cd "$(dirname "$0")/.."
export OUT="${OUT:-benchmarks/results}" PYTHONUNBUFFERED=1
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
STEPS=${STEPS:-500}
mkdir -p "$OUT"
runs=$(mktemp -d)
end=$(($(date +%s) + 540))

part() { # NAME SECONDS COMMAND...
  name=$1 limit=$2 begun=$(date +%s)
  shift 2
  [ $((end - begun)) -ge "$limit" ] || limit=$((end - begun))
  [ "$limit" -gt 0 ] || limit=1
  timeout -k 5 "$limit" "$@" >"$runs/$name.log" 2>&1
  code=$?
  "$PYTHON" - "$OUT/gpu_$name.json" "$runs/$name.log" "$code" $(($(date +%s) - begun)) "$@" <<'END'
import json, sys
from pathlib import Path

out, log, code, seconds, *command = sys.argv[1:]
said = Path(log).read_text(errors="replace").splitlines()[-60:]
record = {"command": " ".join(command), "exit_code": int(code), "seconds": int(seconds), "said": said}
Path(out).write_text(json.dumps(record, indent=1) + "\n")
END
  echo "$name: exit code $code after $(($(date +%s) - begun)) s"
  tail -n 4 "$runs/$name.log" | sed 's/^/  /'
}

on_gpu() { # NAME SECONDS COMMAND...
  if [ "$gpu" = 1 ]; then part "$@"; else echo "$1: needs a GPU, left out"; fi
}

demo() { # NAME SECONDS OPTIONS...: trains, then evaluates the run by k-NN
  run=$1 seconds=$2
  shift 2
  part "$run" "$seconds" "$PYTHON" swav.py --out "$runs/$run" --max-steps "$STEPS" --log-every 50 "$@"
  part "${run}_knn" 60 "$PYTHON" eval_knn.py "$runs/$run" --k 20
}

part machine 20 "$PYTHON" -c '
import importlib.util, torch
packages = "torch torchvision numpy scipy PIL pytest hypothesis sklearn lightly".split()
print("missing:", [name for name in packages if importlib.util.find_spec(name) is None])
print("torch", torch.__version__, "CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version())
print(torch.cuda.get_device_properties(0) if torch.cuda.is_available() else "no GPU")'
grep -q "no GPU" "$runs/machine.log" && gpu=0 || gpu=1

step="$PYTHON -m benchmarks.step --recipes swav_400ep_8x32 --rounds 3"
on_gpu tests 60 "$PYTHON" -m pytest -m gpu -rA --continue-on-collection-errors tests
group="RANK=0 WORLD_SIZE=1 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29533"
on_gpu norm 45 env $group $step --name gpu_step_norm --parts norm --batch-size 32
on_gpu step_32 45 $step --name gpu_step_32 --parts eager --batch-size 32
on_gpu step_128 60 $step --name gpu_step_128 --parts eager kernels --batch-size 128
on_gpu compiled 100 $step --name gpu_step_compiled --parts compiled --batch-size 128

demo demo_cpu 130 --device cpu --precision float32 & # runs beside the parts on the GPU
if [ "$gpu" = 1 ]; then
  demo demo_bfloat16 60 --precision bfloat16
  demo demo_float32 60 --precision float32
  part resumed_on_cpu 30 "$PYTHON" swav.py --out "$runs/demo_float32" --device cpu --precision float32 \
    --max-steps $((STEPS + 5)) --log-every 1
else
  echo "demo on the GPU: needs a GPU, left out"
fi
wait
rm -r "$runs"
echo "all in $OUT"
