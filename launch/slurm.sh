#!/usr/bin/env bash
# One training run over several machines of a SLURM cluster.
# Needs: the repository and its virtual environment on a file system that all machines share.
# Command, in the repository: sbatch --nodes=2 --gpus-per-node=8 launch/slurm.sh recipe=lora_qwen
#
# Before its time is up, the run stops with a checkpoint and the job is put back into the queue, where
# it resumes the run (docs/runs.md).
#
# LUTHIER_LAUNCH=launch/zero3.yaml chooses a launch config other than fsdp2.yaml, and LUTHIER_VENV a
# virtual environment other than .venv. Everything after the script is passed to train.py unchanged.
#
#SBATCH --job-name=luthier
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.out
#SBATCH --open-mode=append
#SBATCH --requeue
# Two minutes before the time is up, every training process gets SIGUSR1.
#SBATCH --signal=USR1@120

set -euo pipefail

if (($# == 0)); then
  echo "usage: sbatch launch/slurm.sh recipe=NAME [key=value ...]" >&2
  exit 2
fi

# SLURM runs a copy of this script from its own folder.
cd "${SLURM_SUBMIT_DIR:?start this script with sbatch}"
source "${LUTHIER_VENV:-.venv}/bin/activate"

gpus=${SLURM_GPUS_ON_NODE:?ask for GPUs, for instance with --gpus-per-node=8}
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
# Two jobs on one machine must not collide, so the job's number chooses the port. This script runs on
# the first machine, where it takes the next port if a program already listens there.
port=$((20000 + SLURM_JOB_ID % 20000))
while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done

launch=(
  accelerate launch --quiet
  --config_file "${LUTHIER_LAUNCH:-launch/fsdp2.yaml}"
  --num_machines "${#hosts[@]}"
  --num_processes "$((${#hosts[@]} * gpus))"
  --main_process_ip "${hosts[0]}"
  --main_process_port "$port"
)

# accelerate ends with 1 whatever its processes returned, so the first of them writes its code here.
export LUTHIER_EXIT_FILE="$SLURM_SUBMIT_DIR/.luthier-$SLURM_JOB_ID.code"
rm -f "$LUTHIER_EXIT_FILE"
trap 'rm -f "$LUTHIER_EXIT_FILE"' EXIT

# SLURM_NODEID is known only on each machine, so a shell there adds it. accelerate would die of
# SIGUSR1, so its shell ignores the signal; the training processes still handle it.
code=0
srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
  bash -c 'trap "" USR1; exec "${@:2:$1}" --machine_rank "$SLURM_NODEID" "${@:2+$1}"' \
  _ "${#launch[@]}" "${launch[@]}" train.py "$@" || code=$?

# 75: the run was stopped, and the same command resumes it.
if [[ -f "$LUTHIER_EXIT_FILE" && "$(cat "$LUTHIER_EXIT_FILE")" == 75 ]]; then
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
fi
exit "$code"
