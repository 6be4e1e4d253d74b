#!/usr/bin/env bash
# sbatch [options] slurm/predict.sh SHARDS --out OUT --head HEAD [flags of geoloc predict]
# sbatch [options] slurm/predict.sh --from-embeddings EMB --out OUT --head HEAD [flags]
#
# One rank per GPU, or as --ntasks-per-node says; everything as in embed.sh.
#SBATCH --job-name=geoloc-predict
#SBATCH --nodes=1
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@120
set -euo pipefail

# SLURM runs a copy of this file; the others of its folder are beside the one that was submitted. (Of an array SLURM may
# tell the command once a task: the first counts.)
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
source "${GEOLOC_SLURM:-${submitted%%/predict.sh*}}/ranks.sh"

progress() { find "$out/_done" -name '*.json' | wc -l; }

run_ranks predict "$@"
