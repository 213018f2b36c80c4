#!/usr/bin/env bash
# Ray on every node of a Slurm allocation, and one Longroll run on it.
#
#   sbatch launch/slurm.sh experiment=qwen3_235b_rl_20k run_dir=/shared/runs/rl_20k \
#       journal.dsn=postgresql://journal/longroll
#   sbatch --nodes=8 --export=ALL,LONGROLL_MODULE=launch.serve launch/slurm.sh experiment=qwen3_235b_serving \
#       gateway.host=0.0.0.0 run_dir=/shared/runs/serving
#
# Submit it from the repository, which every node must see at the same path, .venv included. The arguments are Hydra
# overrides. 16 nodes: cluster.num_nodes = 8 for the engines and trainer.num_ranks = 64 GPUs for the trainer.
# Two minutes before its time is over, or when it is preempted, the run is told to stop and Slurm queues it again; it goes
# on from the newest checkpoint in run_dir and from the journal. Exits with the exit code of the run.
#SBATCH --job-name=longroll
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@120
#SBATCH --output=longroll-%j.log
set -euo pipefail

module="${LONGROLL_MODULE:-launch.train}"
start_timeout_s="${LONGROLL_START_TIMEOUT_S:-300}"
gcs_port=6379
dashboard_port=8265
cd "${SLURM_SUBMIT_DIR:?not inside a Slurm job; use sbatch launch/slurm.sh}"
export PATH="$PWD/.venv/bin:$PATH"

export RAY_worker_niceness=0 RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1 TOKENIZERS_PARALLELISM=false
# Every user of the cluster reaches these ports, and whoever reaches Ray may run code: a token for this job alone.
export RAY_AUTH_MODE=token
RAY_AUTH_TOKEN="$(head -c 32 /dev/urandom | od -An -vtx1 | tr -d ' \n')"
export RAY_AUTH_TOKEN

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head_node="${nodes[0]}"
# Not `hostname --ip-address`: on Debian that is 127.0.1.1, which no other node reaches.
head_ip="$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" hostname --all-ip-addresses | awk '{ print $1 }')"
job="longroll-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}"
dashboard="http://$head_ip:$dashboard_port"
ray_options=(--block --num-cpus="${SLURM_CPUS_PER_TASK:-1}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}")

ray_steps=()
run_pid=""
stop_everything() {
    trap - EXIT TERM
    for pid in "${ray_steps[@]}" $run_pid; do kill -TERM "$pid" 2> /dev/null || true; done
    wait || true
}
stop_run() {
    echo "slurm: told to stop; stopping $job"
    python -m launch.submit --address "$dashboard" stop "$job" || true
    if [[ -n "$run_pid" ]]; then wait "$run_pid" || true; fi
    stop_everything
    scontrol requeue "$SLURM_JOB_ID" || echo "slurm: not queued again; sbatch the same command to go on"
    exit 143
}
trap stop_everything EXIT
trap stop_run TERM

# `--temp-dir` of its own: a Ray of another job may have been killed on the same machine.
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head_node" \
    ray start --head --node-ip-address="$head_ip" --port="$gcs_port" --dashboard-host="$head_ip" \
    --dashboard-port="$dashboard_port" --temp-dir="/tmp/ray-$SLURM_JOB_ID" "${ray_options[@]}" &
ray_steps+=($!)

give_up_at=$((SECONDS + start_timeout_s))
wait_for() { # what, command …
    local what="$1"
    shift
    until "$@" > /dev/null 2>&1; do
        for pid in "${ray_steps[@]}"; do
            kill -0 "$pid" 2> /dev/null || { echo "slurm: ray start ended before $what" >&2; exit 1; }
        done
        if ((SECONDS >= give_up_at)); then
            echo "slurm: no $what within $start_timeout_s s" >&2
            exit 1
        fi
        sleep 1
    done
}
wait_for "head on $head_ip:$gcs_port" ray health-check --address "$head_ip:$gcs_port"

if ((${#nodes[@]} > 1)); then
    srun --overlap --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --ntasks-per-node=1 \
        --nodelist="$(IFS=,; echo "${nodes[*]:1}")" \
        ray start --address="$head_ip:$gcs_port" "${ray_options[@]}" &
    ray_steps+=($!)
fi
all_nodes_are_there() {
    local alive
    alive="$(ray list nodes --address "$dashboard" --filter state=ALIVE --limit 10000 --format json \
        | python -c 'import json, sys; print(len(json.load(sys.stdin)))')"
    ((alive == ${#nodes[@]}))
}
wait_for "${#nodes[@]} nodes" all_nodes_are_there
echo "slurm: Ray on ${#nodes[@]} nodes, head $head_ip; submitting $module $*"

# In the background, because bash runs a trap only between two commands.
if [[ "$module" == launch.train ]]; then
    python -m launch.submit --address "$dashboard" --job-id "$job" "$@" &
else
    ray job submit --address "$dashboard" --submission-id "$job" --working-dir . -- python -m "$module" "$@" &
fi
run_pid=$!
status=0
wait "$run_pid" || status=$?
run_pid=""
exit "$status"
