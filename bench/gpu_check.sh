#!/usr/bin/env bash
# All that only a GPU can tell, in one command and under 9 minutes:
#
#     bash bench/gpu_check.sh
#
# Installs dist/*.whl (or, without one, the checkout) into PYTHON's environment with no network, then runs in turn: the
# GPU's tests, the operators' tests on the device, compute-sanitizer on the CUDA kernels, the accuracy table, and the
# benchmark with the time that is left. A stage that fails or runs out of time is noted and the next one runs. A short
# table comes last; summary.json, benchmark.json, accuracy.md and log.txt are in $OUT.
#
#     OUT              where results go             build/gpu_check
#     PYTHON           the interpreter              python3
#     CHECK_SECONDS    time for everything          520
#     EFFATTN_COMMIT   what is being tested         asked of git
set -uo pipefail
cd "$(dirname "$0")/.." || exit

out=${OUT:-build/gpu_check}
python=${PYTHON:-python3}
deadline=$((SECONDS + ${CHECK_SECONDS:-520}))
commit=${EFFATTN_COMMIT:-$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)}
mkdir -p "$out"
out=$(cd "$out" && pwd)
log=$out/log.txt
stages=$out/.stages
: >"$log"
: >"$stages"
export PYTHONSAFEPATH=1 # the installed effattn, not the checkout's
export PYTHONUNBUFFERED=1

note() { # name, result, seconds, remark
  printf '%s\t%s\t%s\t%s\n' "$@" >>"$stages"
  printf '%-22s %-8s %4s s  %s\n' "$@" | cut -c 1-118
}

# Runs a command for at most `limit` seconds and never past the deadline.
stage() { # name, limit, command...
  local name=$1 limit=$2 left=$((deadline - SECONDS)) started=$SECONDS code result
  shift 2
  ((limit < left)) || limit=$left
  if ((limit < 5)); then
    note "$name" skipped 0 "no time left"
    return
  fi
  printf '\n==== %s: %s\n' "$name" "$*" >>"$log"
  timeout --signal=INT --kill-after=10 "$limit" "$@" >"$out/.output" 2>&1
  code=$?
  cat "$out/.output" >>"$log"
  case $code in
    0) result=ok ;;
    124 | 137) result=timeout ;;
    *) result=failed ;;
  esac
  note "$name" "$result" $((SECONDS - started)) "$(grep -v '^[[:space:]]*$' "$out/.output" | tail -n 1 | tr -d '\t=\r')"
}

on_gpu() { # like stage, where there is a GPU
  if [[ $gpu == none ]]; then
    note "$1" skipped 0 "no GPU"
  else
    stage "$@"
  fi
}

install() {
  local wheels=(dist/*.whl)
  if [[ -e ${wheels[0]} ]]; then
    "$python" -m pip install --quiet --no-deps --no-index --force-reinstall "${wheels[-1]}"
  else
    EFFATTN_CUDA=1 "$python" -m pip install --quiet --no-deps --no-index --no-build-isolation --force-reinstall .
  fi && "$python" -m effattn info
}
export -f install
export python

printf 'effattn %s\n' "$commit"
stage install 90 bash -c install

"$python" - "$out/.about" "$commit" >>"$log" 2>&1 <<'PYTHON'
import datetime, json, platform, subprocess, sys

about = {"commit": sys.argv[2], "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
about["python"] = platform.python_version()
try:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    about["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
except (OSError, subprocess.CalledProcessError, IndexError):
    about["driver"] = None
try:
    import torch

    about["torch"] = torch.__version__
    about["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
except ImportError:
    about["torch"] = about["gpu"] = None
try:
    import triton

    about["triton"] = triton.__version__
except ImportError:
    about["triton"] = None
try:
    import effattn
    from effattn import _native

    about["effattn"], about["from"] = effattn.__version__, effattn.__path__[0]
    about["cuda_kernels"] = _native.cuda_problem or "loaded"
except ImportError as error:
    about["effattn"] = about["from"] = None
    about["cuda_kernels"] = str(error)
json.dump(about, open(sys.argv[1], "w"))
PYTHON
about() {
  "$python" -c 'import json, sys; print(json.load(open(sys.argv[1])).get(sys.argv[2]) or "none")' "$out/.about" "$1"
}
gpu=$(about gpu)
for field in gpu driver torch triton python effattn from cuda_kernels; do
  printf '%-13s %s\n' "$field" "$(about "$field")"
done

tests=("$python" -m pytest -q -p no:cacheprovider)
on_gpu "gpu tests" 45 "${tests[@]}" tests -m gpu
on_gpu "operators" 110 "${tests[@]}" -n 6 tests/test_conformance.py tests/test_conformance_calls.py \
  tests/test_conformance_torch.py tests/test_shift_linear.py tests/test_packed_bits.py tests/test_shift_add.py \
  tests/test_retention.py tests/test_cuda_retention.py tests/test_cuda_window*.py tests/test_*toeplitz*.py -k "cuda or triton"

# A tensor that ends where the allocator's block does not would hide an overrun.
sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 1 --print-limit 20)
for tool in memcheck racecheck; do
  if [[ $gpu != none ]] && ! command -v compute-sanitizer >/dev/null; then
    note "$tool" skipped 0 "no compute-sanitizer"
  else
    on_gpu "$tool" 40 "${sanitizer[@]}" --tool "$tool" "$python" -m effattn.bench.cuda_calls
  fi
done

on_gpu "accuracy" 45 "$python" -m effattn.bench.accuracy --backend cuda triton --output "$out/accuracy.md"
on_gpu "benchmark" 400 "$python" -m effattn bench --device cuda --quick --json "$out/benchmark.json"

"$python" - "$out" <<'PYTHON'
import json, sys
from pathlib import Path

out = Path(sys.argv[1])
about, stages = out / ".about", out / ".stages"
rows = [line.split("\t") for line in stages.read_text().splitlines()]
summary = {
    "machine": json.loads(about.read_text()) if about.exists() else {},
    "stages": [
        {"name": name, "result": result, "seconds": int(seconds), "remark": remark}
        for name, result, seconds, remark in rows
    ],
}
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
for temporary in (about, stages, out / ".output"):
    temporary.unlink(missing_ok=True)
machine = summary["machine"]
print(f"\n{machine.get('gpu') or 'no GPU'}, driver {machine.get('driver')}, torch {machine.get('torch')}, "
      f"triton {machine.get('triton')}, effattn {machine.get('effattn')} at {machine.get('commit')}")
for name, result, seconds, remark in rows:
    print(f"{name:14}{result:9}{seconds:>4} s  {remark.strip()[:80]}")
raise SystemExit(any(result != "ok" for _, result, _, _ in rows))
PYTHON
