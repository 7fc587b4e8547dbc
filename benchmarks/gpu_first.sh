#!/usr/bin/env bash
# What to check in the first ten minutes on a GPU: one verdict a line, in this order. Without a GPU it is a rehearsal.
#
#   benchmarks/gpu_first.sh [FOLDER]      logs and runs go to FOLDER (default: a temporary one)
#
# Exit code 1 if any line failed.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath "${1:-$(mktemp -d)}")
mkdir -p "$out"
gpus=$(python -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')
failed=0

if [ "$gpus" -gt 0 ]; then
    run=(python CIFAR/main_suptickets.py --demo --deterministic) launch=() table=() tests=(tests --gpu)
else
    run=(python CIFAR/main_suptickets.py --demo --deterministic --epochs 6 --cycle 1 --cycle_rate 0.34
        --final-prune-epoch 2)
    table=(--model cifar_resnet_8 --batch-size 16 --images 256 --repeats 1 --only masks) tests=(tests/sparse/test_gpu.py)
    launch=(--no-cuda)
fi

# say VERDICT NAME SECONDS [REMARK]
say() { printf '%-8s %-44s %5s s  %s\n' "$1" "$2" "$3" "${4:-}"; }

# within LIMIT COMMAND…: run a command or a function; after LIMIT seconds end it and all it started, and fail.
within() {
    local limit=$1 job status
    shift
    set -m # a process group of its own
    "$@" &
    job=$!
    (sleep "$limit" && kill -TERM -- "-$job") 2>/dev/null &
    set +m
    wait "$job"
    status=$?
    kill -- "-$!" 2>/dev/null
    return "$status"
}

# try NAME LIMIT COMMAND…: run a command for at most LIMIT seconds; the last line of its output is the remark.
try() {
    local name=$1 limit=$2 log="$out/${1// /_}.log" began=$SECONDS
    shift 2
    if within "$limit" "$@" >"$log" 2>&1; then
        say ok "$name" $((SECONDS - began)) "$(tail -n 1 "$log")"
    else
        say FAILED "$name" $((SECONDS - began)) "see $log"
        failed=1
    fi
}

# needs GPUS NAME: whether there are so many; else say that the line is left out.
needs() { [ "$gpus" -ge "$1" ] || { say skipped "$2" 0 "needs $1 GPU(s)"; return 1; }; }

same_bits() {
    python - "$@" <<'PYTHON'
import sys
import torch
from pathlib import Path

for name in ("model_current.pth", "model_previous.pth"):
    one, other = (torch.load(Path(folder) / name, map_location="cpu", weights_only=True) for folder in sys.argv[1:])
    for kind in ("state_dict", "masks"):
        differing = [key for key, entry in one[kind].items() if not torch.equal(entry, other[kind][key])]
        if differing:
            sys.exit(f"{name}: {kind} differ in {len(differing)} of {len(one[kind])} entries, {differing[0]} first")
print("every weight, statistic and mask is equal")
PYTHON
}

# Stop a run after its first checkpoint, as Ctrl-C does, and resume it.
stopped_and_resumed() {
    "${run[@]}" --save "$out/stopped" &
    local process=$!
    until [ -e "$out/stopped/checkpoint.pth" ] || ! kill -0 "$process" 2>/dev/null; do sleep 0.2; done
    kill -TERM "$process"
    wait "$process"
    [ $? -eq 143 ] && "${run[@]}" --save "$out/stopped" --resume "$out/stopped" && same_bits "$out/one" "$out/stopped"
}

# Two ranks, of which the second looks for data that is not there: the job has to end, not to wait.
failing_rank() {
    local rank='[ "$LOCAL_RANK" = 1 ] && set -- "$@" --data missing.npz; exec "$@"'
    python -m torch.distributed.run --standalone --nproc_per_node 2 --no-python \
        bash -c "$rank" rank "${run[@]}" "${launch[@]}" --save "$out/failing" && return 1
    echo "ended"
}

two_ranks() {
    if [ "$gpus" -ge 2 ]; then
        "${run[@]}" --mgpu --save "$out/ranks"
    else
        python -m torch.distributed.run --standalone --nproc_per_node 2 "${run[@]:1}" "${launch[@]}" --save "$out/ranks"
    fi
}

rm -rf "$out/one" "$out/two" "$out/stopped" "$out/fp16" "$out/momentum" "$out/failing" "$out/ranks"
[ "$gpus" -gt 0 ] || echo "no GPU here: a rehearsal on the CPU"
try "demo, deterministic" 180 "${run[@]}" --save "$out/one"
needs 1 "float16, deterministic" && try "float16, deterministic" 180 "${run[@]}" --fp16 --save "$out/fp16"
try "the same again" 180 "${run[@]}" --save "$out/two"
try "two equal runs" 30 same_bits "$out/one" "$out/two"
try "a stopped and resumed run" 300 stopped_and_resumed
try "growth by momentum" 180 "${run[@]}" --growth momentum --save "$out/momentum"
try "speed" 600 python benchmarks/speed.py --no-compile "${table[@]}" --out "$out/speed.json"
needs 1 "speed, compiled" && try "speed, compiled" 600 python benchmarks/speed.py --out "$out/compiled.json"
try "tests about GPUs" 600 python -m pytest "${tests[@]}"
if [ "$gpus" -ne 1 ] || needs 2 "two processes"; then
    try "a failing rank ends the job" 60 failing_rank
    try "demo, two processes" 180 two_ranks
fi
echo "logs are in $out"
exit "$failed"
