#!/usr/bin/env bash
# sbatch [options] slurm/embed.sh SHARDS --out OUT [flags of geoloc embed]
#
# One rank per GPU, on as many nodes as asked for; ranks share nothing but OUT. sbatch's own options win over the lines
# below: sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=14 --time=4:00:00 slurm/embed.sh ...
#SBATCH --job-name=geoloc-embed
#SBATCH --nodes=1
#SBATCH --no-kill
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR2@120
set -euo pipefail

# SLURM runs a copy of this file; the others of its folder are beside the one that was submitted. (Of an array SLURM may
# tell the command once a task: the first counts.)
submitted=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/^ *Command=//p')
source "${GEOLOC_SLURM:-${submitted%%/embed.sh*}}/ranks.sh"

progress() { find "$out/_done" -name '*.json' | wc -l; }

run_ranks embed "$@"
