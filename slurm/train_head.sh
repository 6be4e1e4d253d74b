#!/usr/bin/env bash
# sbatch [options] slurm/train_head.sh EMBEDDINGS --cells CELLS --out OUT [flags of geoloc train]
#
# Training is one process on one device today: stored embeddings keep a GPU busy for minutes, not days. It goes on from
# its last epoch after a preemption, a time limit or a lost node.
#SBATCH --job-name=geoloc-train
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@120
set -euo pipefail

# SLURM runs a copy of this file; the others of its folder are beside the one that was submitted. (Of an array SLURM may
# tell the command once a task: the first counts.)
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
source "${GEOLOC_SLURM:-${submitted%%/train_head.sh*}}/ranks.sh"

progress() { find "$out" \( -name _checkpoint.pt -o -name head.json \) -printf '%p %T@\n' | sort; }

run_ranks train "$@"
