# What embed.sh, predict.sh and train_head.sh share: ranks through srun, the grace time, one exit code, the requeue.
# They define progress(), which prints something else as soon as work was committed to $out.
#
# GEOLOC          the command, geoloc; GEOLOC="apptainer exec --nv geoloc.sif geoloc" runs it in a container
# GEOLOC_GRACE_S  seconds from the signal until ranks that still work are ended, 90: less than --signal gives them
source "${BASH_SOURCE[0]%/*}/env.sh"

# The value of --out among a command's arguments.
out_of() {
    local out=
    while (($#)); do
        case $1 in
            --out) out=${2:-} ;;
            --out=*) out=${1#--out=} ;;
        esac
        shift
    done
    echo "$out"
}

# A rank that is lost takes no other along, and nobody waits for it. Scripts whose ranks need each other say otherwise:
# then srun_options differ, and with is_lost_75=1 a job that lost a rank to a signal is incomplete, not failed.
srun_options=(--kill-on-bad-exit=0 --no-kill --wait=0)
is_lost_75=

say() { echo "slurm: job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}: $*" >&2; }

# run_ranks COMMAND ARGUMENTS...: run `geoloc COMMAND ARGUMENTS...` in every rank, and end as OUT deserves.
run_ranks() {
    out=$(out_of "$@")
    [[ -n $out ]] || { say "--out must be among the arguments: name the folder of the results"; exit 2; }
    local before code codes=$out/_logs/slurm.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
    before=$(progress 2>/dev/null) || true
    copy_to_nodes "$@"
    say "$SLURM_NNODES nodes ($SLURM_JOB_NODELIST): geoloc ${arguments[*]}"
    launch bash -c "$RANK" rank "$codes" ${GEOLOC:-geoloc} "${arguments[@]}"
    code=$(verdict "$launched" "$codes")
    say "exit code $code$([[ $code == "$launched" ]] || echo ", though ranks ended with up to $launched")"
    [[ $code != 75 ]] || requeue "$before"
    exit "$code"
}

# A rank notes how it ended. Signals go to it and to this shell around it, which has to outlive it.
RANK='trap : TERM INT USR2
codes=$1; shift
"$@"
code=$?
{ : >"$codes.$code"; } 2>/dev/null
exit $code'

# Start the ranks, hand the signal on to them, wait for all. Sets `launched` to the highest exit code.
launch() {
    local code is_again=1 step=
    is_asked=
    # To srun itself SIGTERM means: kill the ranks. USR2 it hands on, and to them both mean the same.
    trap 'is_again=1; is_asked=1; [[ -z $step ]] || { kill -USR2 "$step" || true; end_in_time "$step" & }' USR2
    # scancel and a preemption tell ranks, srun and this shell at once: here nothing is left but to wait.
    trap 'is_again=1; is_asked=1' TERM
    srun "${srun_options[@]}" --label "$@" &
    step=$!
    while [[ $is_again ]]; do
        is_again=
        wait "$step" && code=0 || code=$?
        # 127: it had been waited for already, when a last signal came.
        [[ $code == 127 ]] || launched=$code
    done
}

# What is not through in time is ended: its units are done again, and the job is still there to be requeued.
end_in_time() {
    sleep "${GEOLOC_GRACE_S:-90}"
    kill -USR2 "$1" || true
}

# The exit code of the job, from the highest one of its ranks and those that they noted. A rank that says complete knows
# it of every unit: then it does not matter how others ended.
verdict() {
    local code found=$1
    # Ended by a signal, and it was ours.
    [[ -z $is_asked$is_lost_75 ]] || ((found < 128)) || found=75
    for code in 75 0 3; do
        [[ ! -e $2.$code ]] || found=$code
    done
    rm -f "$2".*
    echo "$found"
}

# Start again from the queue, if this start has brought the work on and nobody has cancelled the job.
requeue() {
    if [[ $(progress 2>/dev/null) == "$1" ]]; then
        say "not requeued: nothing was committed since this start. Give it more --time, or smaller shards"
    elif [[ $(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) != RUNNING ]]; then
        say "not requeued: SLURM is ending the job"
    elif scontrol requeue "$SLURM_JOB_ID"; then
        say "requeued"
        # SLURM ends this shell; until then the job must not look as if it were over.
        sleep 60
    fi
}
