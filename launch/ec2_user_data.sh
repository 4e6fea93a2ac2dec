#!/bin/bash
# What a machine started by ec2.py does, as root, when it starts: fetch source and run folder, train on all GPUs, copy the run folder
# to the bucket every minute, save when EC2 announces that it takes the machine away (two minutes ahead), and end the machine.
# Set in front by ec2.py: ANEW_S3 (s3://bucket/prefix), ANEW_MINUTES (longest life), ANEW_TRAIN (recipe and settings).
set -uo pipefail
HOME_DIR=${ANEW_HOME:-/opt/anew}
METADATA=${ANEW_METADATA:-http://169.254.169.254}
EVERY=${ANEW_EVERY:-5}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # a large model takes its time to save
export ANEW_CACHE=$HOME_DIR/cache
mkdir -p "$HOME_DIR/run" && cd "$HOME_DIR" || exit 1
exec > >(tee -a "$HOME_DIR/boot.log") 2>&1

finish() {
    keep_run
    aws s3 cp "$HOME_DIR/boot.log" "$ANEW_S3/boot.log" --only-show-errors
    shutdown -h now
}
# --delete drops what the run itself has pruned; what an unfinished save left here does not travel
keep_run() { [ -e restored ] && aws s3 sync run "$ANEW_S3/run" --delete --exclude '*.tmp*' --exclude '*.lock' --only-show-errors; }

taken_away() {
    local token
    token=$(curl -sf -m 2 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' "$METADATA/latest/api/token") || return 1
    curl -sf -m 2 -o /dev/null -H "X-aws-ec2-metadata-token: $token" "$METADATA/latest/meta-data/spot/instance-action"
}

trap finish EXIT
shutdown -h "+$ANEW_MINUTES" # in case all else fails
aws s3 cp "$ANEW_S3/source.tar.gz" source.tar.gz --only-show-errors && tar xzf source.tar.gz || exit 1
aws s3 sync "$ANEW_S3/run" run --only-show-errors || exit 1
touch restored # from here on this folder is the newest there is

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
eval "settings=($ANEW_TRAIN)" # quoted by ec2.py
"$ANEW_PYTHON" -m anew train "${settings[@]}" --dry-run || exit 2 # wrong settings are said once, and not by each restart

"$ANEW_PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$processes" --max-restarts 3 \
    -m anew train "${settings[@]}" --out run &
trainer=$!
told= copied=$SECONDS
while kill -0 "$trainer" 2>/dev/null; do
    if [ -z "$told" ] && taken_away; then
        echo "EC2 takes this machine away: saving"
        kill -TERM "$trainer"
        told=yes
    fi
    if ((SECONDS - copied >= ${ANEW_COPY_EVERY:-60})); then
        keep_run
        copied=$SECONDS
    fi
    sleep "$EVERY"
done
wait "$trainer"
echo "training ended with $?"
