#!/bin/bash
# Runs as root when a machine that ec2.py requested starts. The script downloads the source and the run
# folder, trains on all GPUs, copies the run folder to the bucket every minute, saves a checkpoint when
# EC2 announces an interruption (two minutes in advance), and shuts the machine down at the end.
# ec2.py exports these variables at the top: ANEW_S3 (s3://bucket/prefix), ANEW_MINUTES (the longest
# time that the machine may run) and ANEW_TRAIN (the recipe and its settings).
set -uo pipefail
HOME_DIR=${ANEW_HOME:-/opt/anew}
METADATA=${ANEW_METADATA:-http://169.254.169.254}
EVERY=${ANEW_EVERY:-5}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # seconds: saving a large model takes a while
export ANEW_CACHE=$HOME_DIR/cache
mkdir -p "$HOME_DIR/run" && cd "$HOME_DIR" || exit 1
exec > >(tee -a "$HOME_DIR/boot.log") 2>&1

finish() {
    upload_run
    aws s3 cp "$HOME_DIR/boot.log" "$ANEW_S3/boot.log" --only-show-errors
    shutdown -h now
}

# --delete removes checkpoints that the run has pruned. Files of an unfinished save are not uploaded.
upload_run() {
    [ -e restored ] && aws s3 sync run "$ANEW_S3/run" --delete \
        --exclude '*.tmp*' --exclude '*.lock' --only-show-errors
}

interruption_is_announced() {
    local token
    token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' \
        "$METADATA/latest/api/token") || return 1
    curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" \
        "$METADATA/latest/meta-data/spot/instance-action"
}

trap finish EXIT
shutdown -h "+$ANEW_MINUTES" # limits the cost if the rest of this script fails
aws s3 cp "$ANEW_S3/source.tar.gz" source.tar.gz --only-show-errors &&
    tar xzf source.tar.gz || exit 1
aws s3 sync "$ANEW_S3/run" run --only-show-errors || exit 1
touch restored # from here on the local run folder is the newest copy and may be uploaded

if [ -z "${ANEW_PYTHON:-}" ]; then
    ANEW_PYTHON=/opt/pytorch/bin/python # where AWS's image has PyTorch
    if [ ! -x "$ANEW_PYTHON" ]; then
        python3 -m venv .venv || exit 1
        ANEW_PYTHON=$HOME_DIR/.venv/bin/python
    fi
    "$ANEW_PYTHON" -m pip install --quiet '.[tensorboard,vocabulary]' || exit 1
fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
processes=${ANEW_PROCESSES:-$((gpus > 0 ? gpus : 1))}
eval "settings=($ANEW_TRAIN)" # ec2.py has quoted each word for the shell
# The dry run reports invalid settings once instead of in each process and after each restart.
"$ANEW_PYTHON" -m anew train "${settings[@]}" --dry-run || exit 2

"$ANEW_PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" \
    --max-restarts 3 -m anew train "${settings[@]}" --out run &
trainer=$!
stop_requested=
uploaded=$SECONDS
while kill -0 "$trainer" 2>/dev/null; do
    if [ -z "$stop_requested" ] && interruption_is_announced; then
        echo "EC2 has announced an interruption: saving a checkpoint"
        kill -TERM "$trainer"
        stop_requested=yes
    fi
    if ((SECONDS - uploaded >= ${ANEW_COPY_EVERY:-60})); then
        upload_run
        uploaded=$SECONDS
    fi
    sleep "$EVERY"
done
wait "$trainer"
echo "training ended with exit code $?"
