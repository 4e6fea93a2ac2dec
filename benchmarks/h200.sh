#!/usr/bin/env bash
# Everything that has to be seen on an NVIDIA GPU, in one command: first that it is right, then how fast it is.
#
#   benchmarks/h200.sh results            # about 25 minutes on one H100 or H200; figures as JSON lines in results/figures.jsonl
#   PART=1 benchmarks/h200.sh results     # or in parts of less than ten minutes: 1 correctness, 2 ladder and attention, 3 the step, 4 the rest,
#                                         5 the fast recipe (not in all: about 25 minutes in pieces, the same command until it ends; DATA=a data folder)
#
# Python, torch with CUDA, triton, safetensors, tiktoken, huggingface_hub, pyarrow, filelock, matplotlib and pytest must be there (part 5: transformers). The command line needs
# tyro, rich and loguru; where they are missing, wheels in the folder .whl are used (pip download --no-deps -d .whl tyro loguru typeguard ...).
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?a folder for the results}
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
try() { # NAME COMMAND...: its output to results/NAME.txt and its end to the screen
    local name=$1
    shift
    say "$name: $*"
    timeout "${LIMIT:-420}" "$@" > "$out/$name.txt" 2>&1 || { code=$?; ((code == 75)) && echo "to be gone on with: the same command" || { failed=1; echo "FAILED with $code"; }; }
    tail -n "${LINES_SHOWN:-12}" "$out/$name.txt"
}
bench() { # NAME ARGUMENTS...: as try, and the JSON that ends its output to figures.jsonl
    local name=$1
    shift
    try "$name" "$python" -m anew bench "$@" --json
    tail -n 1 "$out/$name.txt" | grep '^{' | sed "s/^{/{\"name\": \"$name\", /" >> "$out/figures.jsonl"
}
wants() { [[ $part == all || $part == "$1" ]]; }

say "$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2> /dev/null || echo 'no nvidia-smi')"
"$python" -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'

if wants 1; then
    LINES_SHOWN=30 try correct "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py tests/test_cross_entropy.py tests/test_probe.py
fi
if wants 2; then
    bench ladder ladder gpt2-124m --micro-batch 16 --seq-len 1024 --rounds 10 --picture "$out/ladder.png"
    bench attention attention gpt2-124m --micro-batch 16 --seq-len 1024
fi
if wants 3; then # the headline: tokens a second at T = 1024
    for micro in 16 32 64; do
        for attention in flash cudnn; do
            bench "step-$micro-$attention" train gpt2-124m --micro-batch "$micro" --seq-len 1024 --attention "$attention" --rounds 20 --alone
        done
    done
    bench step-transformers train gpt2-124m --micro-batch 16 --seq-len 1024 --rounds 20
fi
if wants 4; then
    bench generate-1 generate gpt2-124m
    bench generate-16 generate gpt2-124m --rows 16
    bench step-recompute train gpt2-124m --micro-batch 64 --seq-len 1024 --recompute --alone
    for size in 350m 774m 1558m; do
        bench "step-$size" train "gpt2-$size" --micro-batch 8 --seq-len 1024 --alone
    done
    run="$out/profiled"
    try profile "$python" -m anew train gpt2-124m --data stdlib --steps 12 --warmup-steps 2 --batch-tokens 65536 --micro-batch 64 \
        --val-tokens 0 --profile 3 --out "$run"
    gzip -f "$run/trace.json" 2> /dev/null && mv "$run/trace.json.gz" "$out/"
    rm -rf "$run"
fi
if [[ $part == 5 ]]; then # Muon's share of a step, then time to a loss at 50M tokens an arm
    if ! grep -qs '"step-64-muon"' "$out/figures.jsonl"; then
        bench step-64-adamw train gpt2-124m --micro-batch 64 --seq-len 1024 --rounds 20 --alone
        bench step-64-muon train gpt2-124m --micro-batch 64 --seq-len 1024 --rounds 20 --alone --optimizer muon
    fi
    LIMIT=580 LINES_SHOWN=30 bench recipe recipe gpt2-124m --data "${DATA:-fineweb-edu}" --steps 763 --batch-tokens 65536 --micro-batch 64 \
        --val-tokens 1048576 --minutes 7 --out runs/recipe-124m --picture "$out/recipe.png"
fi
say "figures: $out/figures.jsonl"
exit $failed
