#!/usr/bin/env bash
# Run the tests and the measurements that need an NVIDIA GPU, in parts of less than eight minutes each.
#
#   PART=1 benchmarks/h200.sh results     # one part; the numbers give the order in which to run them
#   benchmarks/h200.sh results            # parts 1 to 8 in order, about 45 minutes on an H100 or H200
#
#   1  correctness: tests/gpu/test_cuda.py, tests/unit/model/test_cross_entropy.py
#   2  training step of 124M at 64 x 1024: each attention kernel, compilation by block, and a profile
#   3  decoding compared with transformers: one row and sixteen rows
#   4  the speed ladder
#   5  training step compared with transformers at 16 x 1024; recomputation; automatic micro-batch
#   6  attention kernels by sequence length
#   7  training steps of 350M and 774M
#   8  training step of 1558M; the optimizers' share of a step with AdamW and Muon
#   9  time to a loss with the fast recipe, 50M tokens for each side. This part is not in "all": repeat
#      the command until it reports that it is complete, about 25 minutes in total. DATA names a
#      prepared data folder.
#
# results/figures.jsonl holds one JSON object for each measurement, results/*.txt the output of each
# command.
#
# The machine needs Python, torch with CUDA, triton, safetensors, tiktoken, huggingface_hub, pyarrow,
# filelock, rich and pytest, for parts 3 and 5 also transformers, and for pictures matplotlib. If tyro or
# loguru is missing, the wheels in the folder .whl are installed. To download them:
#   pip download --no-deps -d .whl tyro==1.0.17 loguru typeguard docstring_parser
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/h200.sh FOLDER_FOR_RESULTS}
part=${PART:-all}
python=${PYTHON:-python3}
mkdir -p "$out"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
if ! "$python" -c 'import tyro, loguru' 2> /dev/null && ls .whl/*.whl > /dev/null 2>&1; then
    site=$(mktemp -d)
    "$python" -m pip install -q --no-index --no-deps --no-compile --target "$site" .whl/*.whl
    export PYTHONPATH="$site:$PYTHONPATH"
fi
failed=0

say() { printf '\n== %s\n' "$*"; }

# run SECONDS NAME COMMAND...
# Run a command with a time limit. Write its output to NAME.txt and print the last lines.
run() {
    local limit=$1 name=$2 code=0
    shift 2
    say "$name: $*"
    timeout "$limit" "$@" > "$out/$name.txt" 2>&1 || code=$?
    if ((code == 75)); then
        echo "not complete yet: run the same command again"
    elif ((code != 0)); then
        failed=1
        echo "FAILED with exit code $code"
    fi
    tail -n "${LINES_SHOWN:-12}" "$out/$name.txt"
}

# bench SECONDS NAME ARGUMENTS...
# Run `anew bench` and append the JSON object on its last line to figures.jsonl.
bench() {
    local limit=$1 name=$2
    shift 2
    run "$limit" "$name" "$python" -m anew bench "$@" --json
    tail -n 1 "$out/$name.txt" | grep '^{' | sed "s/^{/{\"name\": \"$name\", /" >> "$out/figures.jsonl"
}

wants() { [[ $part == all || $part == "$1" ]]; }

say "$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null || echo 'no nvidia-smi')"
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'

if wants 1; then
    LINES_SHOWN=40 run 460 correct "$python" -m pytest -q -p no:cacheprovider tests/gpu/test_cuda.py tests/unit/model/test_cross_entropy.py
fi
if wants 2; then
    for attention in cudnn flash auto; do
        bench 110 "step-64-$attention" train gpt2-124m --micro-batch 64 --seq-len 1024 --attention "$attention" --rounds 20 --alone
    done
    bench 60 step-64-blocks train gpt2-124m --micro-batch 64 --seq-len 1024 --compile blocks --rounds 20 --alone
    profiled="$out/profiled"
    run 90 profile "$python" -m anew train gpt2-124m --data stdlib --steps 12 --warmup-steps 2 --batch-tokens 65536 \
        --micro-batch 64 --val-tokens 0 --profile 3 --out "$profiled"
    gzip -f "$profiled/trace.json" 2> /dev/null && mv "$profiled/trace.json.gz" "$out/"
    rm -rf "$profiled"
fi
if wants 3; then
    bench 200 generate-1 generate gpt2-124m
    bench 200 generate-16 generate gpt2-124m --rows 16
fi
if wants 4; then
    bench 460 ladder ladder gpt2-124m --micro-batch 16 --seq-len 1024 --rounds 10 --picture "$out/ladder.png"
fi
if wants 5; then
    bench 200 step-transformers train gpt2-124m --micro-batch 16 --seq-len 1024 --rounds 20
    bench 110 step-recompute train gpt2-124m --micro-batch 64 --seq-len 1024 --recompute --rounds 10 --alone
    automatic="$out/automatic"
    run 140 micro-batch-auto "$python" -m anew train gpt2-124m --data stdlib --steps 3 --warmup-steps 1 --val-tokens 0 --out "$automatic"
    rm -rf "$automatic"
fi
if wants 6; then
    bench 460 attention attention gpt2-124m --micro-batch 16 --seq-len 1024
fi
if wants 7; then
    bench 200 step-350m train gpt2-350m --micro-batch 32 --seq-len 1024 --rounds 10 --alone
    bench 260 step-774m train gpt2-774m --micro-batch 16 --seq-len 1024 --compile blocks --rounds 10 --alone
fi
if wants 8; then
    bench 200 step-1558m train gpt2-1558m --micro-batch 16 --seq-len 1024 --compile blocks --rounds 10 --alone
    for optimizer in adamw muon; do
        bench 120 "step-64-$optimizer" train gpt2-124m --micro-batch 64 --seq-len 1024 --optimizer "$optimizer" --rounds 20 --alone
    done
fi
if [[ $part == 9 ]]; then
    LINES_SHOWN=30 bench 460 recipe recipe gpt2-124m --data "${DATA:-fineweb-edu}" --steps 763 --batch-tokens 65536 \
        --micro-batch 64 --val-tokens 1048576 --minutes 6 --out runs/recipe-124m --picture "$out/recipe.png"
fi
say "figures: $out/figures.jsonl"
exit "$failed"
