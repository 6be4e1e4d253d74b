#!/usr/bin/env bash
# sbatch [options] slurm/train_head.sh EMBEDDINGS --cells CELLS --out OUT [flags of geoloc train]
#
# One rank for each GPU of the job, or one a node where none was asked for; together they train one head. It goes on
# from its last epoch after a preemption, a time limit, a lost rank or a lost node, also with another number of ranks.
#SBATCH --job-name=geoloc-train
#SBATCH --nodes=1
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@120
set -euo pipefail

# SLURM runs a copy of this file; the others of its folder are beside the one that was submitted. (Of an array SLURM may
# tell the command once a task: the first counts.)
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
source "${GEOLOC_SLURM:-${submitted%%/train_head.sh*}}/ranks.sh"

progress() { find "$out" \( -name _checkpoint.pt -o -name head.json \) -printf '%p %T@\n' | sort; }

# Ranks that train together need each other. They end by themselves when one is lost; srun sees to it a minute later.
srun_options=(--kill-on-bad-exit=0 --wait=60)
is_lost_75=1

# This script runs on the first node, as the first rank does. Its address is known even where its name is not.
export MASTER_ADDR=${MASTER_ADDR:-$(scontrol show node "$SLURMD_NODENAME" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')}

run_ranks train "$@"
