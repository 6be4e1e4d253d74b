# The environment of the ranks. Sourced by ranks.sh; whatever is set already wins.

# Nothing is imported from the folder that a job happens to be submitted from.
export PYTHONSAFEPATH=1

# GPUs were asked for and no tasks: a rank for each GPU of a node, and the CPUs that are ours there in equal parts.
if [[ -n ${SLURM_GPUS_ON_NODE:-} && -z ${SLURM_NTASKS_PER_NODE:-}${SLURM_NTASKS:-} ]]; then
    export SLURM_NTASKS_PER_NODE=$SLURM_GPUS_ON_NODE SLURM_OVERCOMMIT=1
    cpus=$((SLURM_CPUS_ON_NODE / SLURM_GPUS_ON_NODE))
fi

# CPUs of a rank. Since 22.05 srun does not take them over from sbatch, and libraries see the machine's, not their share.
export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-${SLURM_CPUS_PER_TASK:-$((${cpus:-1} > 0 ? ${cpus:-1} : 1))}}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SRUN_CPUS_PER_TASK}

# Triton's own cache locks files, on a disk of the node. Compiled encoders: --compile-cache, on one that all nodes share.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-${TMPDIR:-/tmp}/geoloc-$UID/triton}

# GEOLOC_LOCAL=FOLDER, on a disk of the node: what GEOLOC_COPY="PATH PATH" names (a checkpoint, a head) is read over the
# network once a node, and by the ranks from there. Sets `arguments`, with the copies in place of the originals.
copy_to_nodes() {
    arguments=("$@")
    local path copy i
    [[ -n ${GEOLOC_LOCAL:-} ]] || return 0
    for path in ${GEOLOC_COPY:-}; do
        # A name for each state of the original: a copy is never brought up to date, and moves into place whole.
        copy=$GEOLOC_LOCAL/$(find "$path" -printf '%P %s %T@\n' | sort | md5sum | cut -c1-16)/$(basename "$path")
        srun --ntasks="$SLURM_NNODES" --ntasks-per-node=1 bash -euc '
            [[ -e $2 ]] && exit
            part=$(dirname "$2").$BASHPID
            mkdir -p "$part"
            cp -r "$1" "$part/$(basename "$2")"
            mv -T "$part" "$(dirname "$2")" || { rm -rf "$part"; [[ -e $2 ]]; }' copy "$path" "$copy"
        for i in "${!arguments[@]}"; do
            [[ ${arguments[i]} != "$path" ]] || arguments[i]=$copy
        done
    done
}
