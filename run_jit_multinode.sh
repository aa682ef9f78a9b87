#!/usr/bin/env bash
# Starts main_jit.py with torchrun: environment in, one command out.
#
# Only what is set in the environment becomes a flag. The defaults are main_jit.py's and are
# written there, once, so that the settings stored in a checkpoint hold where nothing was said.
# Flags after the script name go to main_jit.py unchanged and, coming last, win.
#
#   bash run_jit_multinode.sh --help      the variables
#   DRY_RUN=1 bash run_jit_multinode.sh   print the command, start nothing
#
# In this order: check what was asked, find main_jit.py, place the nodes (srun, once), choose
# interpreter and number of processes, build the command, run it, hand signals to it (util/preemption.py)
# and tell its exit code.
set -euo pipefail

die() {
    printf 'run_jit_multinode.sh: error: %s\n' "$*" >&2
    exit 2
}

say() {
    printf 'run_jit_multinode.sh: %s\n' "$*" >&2
}

# start WHAT COMMAND...: prints the command, quoted so that it can be pasted, and runs it until it ends. Sets `code`.
start() {
    local what=$1 line
    shift
    line=$(printf '%q ' "$@")
    if [[ ${DRY_RUN:-0} == 1 ]]; then
        printf '%s\n' "${line% }"
        exit 0
    fi
    say "$what: ${line% }"
    asked='' asked_at=0 at_once=0 running=1
    trap 'stop TERM' TERM
    trap 'stop HUP' HUP
    trap 'stop INT' INT
    trap 'stop USR1' USR1
    trap 'stop QUIT' QUIT
    # Another shell waits for it, which nothing interrupts, and writes its status: where signals are handled, bash's
    # `wait` can lose a status, or hang. All of it ignores what this shell handles: a scheduler sends that to every
    # process of a job.
    (
        trap '' TERM HUP INT USR1 QUIT
        "$@" <&0 3>&- &
        printf '%s\n' "$!" >"$state/child"
        wait "$!" 2>/dev/null && status=0 || status=$?
        printf '%s\n' "$status" >&3
    ) <&0 &
    until read -r -t 1 code <&3; do
        if ! kill -0 "$!" 2>/dev/null; then  # it has written meanwhile, or was killed
            if read -r -t 1 code <&3; then break; fi
            say "the shell that waits for it was killed: all is ended"
            exit 1
        fi
    done
    running=0
    trap '' TERM HUP INT USR1 QUIT  # what is left is short, and a signal would end it in the middle
    if ((at_once)); then code=130; fi
}

# to_child SIGNAL: to what `start` runs.
# shellcheck disable=SC2329  # the traps call it
to_child() {
    local child
    until read -r child 2>/dev/null <"$state/child"; do
        if ! kill -0 "$!" 2>/dev/null; then return; fi
    done
    kill -s "$1" "$child" 2>/dev/null || true  # it may just have ended
}

# stop SIGNAL: asks what `start` runs to stop when it has saved; a second Ctrl-C does not wait for that. One that comes
# within 0.3 s is the first one, sent to this process and to its group, as `timeout` does. Builtins alone: a signal would
# end another program in the middle, and with it this one.
# shellcheck disable=SC2329  # the traps call it
stop() {
    local before=$asked before_at=$asked_at  # as they are now: another signal may come in between
    local now=${EPOCHREALTIME:-$SECONDS.000000}  # microseconds; bash before 5.0: whole seconds
    now=${now/[.,]/}
    if [[ -z ${!:-} ]]; then exit 75; fi  # nothing is started yet
    if [[ $1 == INT && -n $before ]] && ((now - before_at < 300000)); then return 0; fi
    if [[ $1 == QUIT || ($1 == INT && -n $before) ]]; then
        say "stopping at once"
        at_once=1
        to_child "$ends_it"
        return 0
    fi
    asked_at=$now asked=$1
    if [[ -n ${JIT_STATE_DIR:-} ]]; then  # see util/preemption.py
        printf 'SIG%s\n' "$1" >"$JIT_STATE_DIR/stop"
    else
        to_child USR1  # the only one that srun just forwards, to all processes of the step
    fi
}

# make_state: a folder for what is known of what runs; see also util/preemption.py.
make_state() {
    state='' running=0
    if [[ ${DRY_RUN:-0} == 1 ]]; then return; fi
    state=$(mktemp -d "${TMPDIR:-/tmp}/jit-XXXXXX")
    trap clean_up EXIT
    mkfifo "$state/status"
    exec 3<>"$state/status"
}

# clean_up: also where this script ends too early, and what it has started would go on without it.
# shellcheck disable=SC2329  # the trap calls it
clean_up() {
    if ((running)); then to_child "$ends_it"; fi
    rm -rf -- "$state"
}

# requeue: once a job, whichever of its launchers is outermost.
requeue() {
    local job
    if [[ ${REQUEUE:-0} != 1 || $code != 75 ]]; then return; fi
    # KILL: they ignore what this script ignores now.
    job=$(timeout --signal=KILL 60 scontrol show job "$SLURM_JOB_ID" --oneliner | grep -o ' JobState=[A-Z_]*') || true
    job=${job#*=}
    if [[ $job != RUNNING ]]; then  # it was cancelled, its time is over, or SLURM itself requeues it
        say "job $SLURM_JOB_ID is not requeued: its state is ${job:-unknown}"
        return
    fi
    say "job $SLURM_JOB_ID is requeued and goes on from its checkpoint"
    timeout --signal=KILL 60 scontrol requeue "$SLURM_JOB_ID" || say "scontrol refused: submit the job with sbatch --requeue"
}

help() {
    cat <<'HELP'
usage: [VARIABLE=value ...] bash run_jit_multinode.sh [flags of main_jit.py ...]

Starts main_jit.py with torchrun. A variable that is unset or empty passes nothing: the defaults
of MODEL to WANDB_NUM_VIS below are main_jit.py's, and `python main_jit.py --help` lists its
flags. Flags after the script name are appended unchanged and win over variables.

variable                    default                 meaning
DATA_PATH, DATA_ROOT,       needed for ImageFolder  dataset root holding train/, train/ itself, or a cache;
  IMAGENET_ROOT             data                    the first one set wins (the last: ImageFolder only)
MODEL, IMG_SIZE             JiT-B/16, 256
NOISE_SCALE, PRED_PARAM     1.0, x                  PRED_PARAM: x or v
BATCH_SIZE, BLR             128, 5e-5               batch per GPU, base learning rate
EPOCHS, WARMUP_EPOCHS       600, 5
GEN_BSZ, NUM_IMAGES, CFG    128, 50000, 2.9         images per batch, images in all, guidance
INTERVAL_MIN, INTERVAL_MAX  0.1, 1.0                times between which guidance acts
ONLINE_EVAL, EVALUATE_GEN   1, 0                    FID and IS during training; evaluation only
DATASET                     imagefolder             cifar10 and digits need no DATA_PATH
GLOBAL_BATCH                -                       derives gradient accumulation from BATCH_SIZE
                                                    and the number of processes
OUTPUT_DIR                  output/<run name>       folder; training goes on from a checkpoint in it
RESUME                      OUTPUT_DIR              folder, never a .pth file. Training: only starts
                                                    a run. Evaluation: what is evaluated
WANDB_PROJECT, WANDB_ENTITY jit, -
WANDB_RUN_NAME, WANDB_MODE  derived, offline
WANDB_NUM_VIS               16
WANDB_API_KEY               -                       stays in the environment: never on a command
                                                    line, never in a log
ENABLE_WANDB                1                       0 means --wandb_mode disabled
NUM_GPUS                    detected, else 1        processes per node, detected from
                                                    CUDA_VISIBLE_DEVICES, then nvidia-smi
NNODES, WORLD_SIZE          SLURM's, else 1         number of NODES; WORLD_SIZE is the older name
NODE_RANK                   SLURM's, else 0         number of this node
MASTER_ADDR                 SLURM's, else this host node 0
MASTER_PORT                 29500                   on a single node, when not set: a free port,
                                                    so that two runs on one machine do not collide
AUTO_SRUN                   1                       inside a SLURM allocation of more than one
                                                    node, start once per node with srun
REQUEUE                     0                       1, in a SLURM job that was asked to stop: put it
                                                    back into the queue (sbatch --requeue)
MAX_RESTARTS                -                       so often torchrun starts all processes again
                                                    when one has failed, from the last checkpoint
LOCAL_ADDR                  this host's name        address of this node for the others, with
                                                    MAX_RESTARTS, where they do not know its name
CONDA_ENV_PATH              -                       environment to use, conda or venv
PYTHON                      active environment,     interpreter, where CONDA_ENV_PATH is not set
                            .venv here, python3
OMP_NUM_THREADS, NCCL_*     -                       passed through when set, never forced
NCCL_SOCKET_IFNAME          NCCL's choice           network interface between nodes for GPUs
GLOO_SOCKET_IFNAME          that of the host's name for what processes tell each other, also in runs on GPUs
JIT_DIR                     SLURM_SUBMIT_DIR        folder of main_jit.py, for sbatch from elsewhere
DRY_RUN                     0                       1 prints the command and starts nothing
ONLINE_EVAL, EVALUATE_GEN, ENABLE_WANDB, AUTO_SRUN, REQUEUE and DRY_RUN are 0 or 1.

TERM, HUP, USR1 and Ctrl-C: training stops after the current step and writes a checkpoint, an evaluation
keeps what it has; a second Ctrl-C stops at once. Exit code: 75 when asked to stop (the same command goes
on), 2 for what a sentence explains, 130 when stopped at once, else torchrun's.
MAX_RESTARTS heals a process that died (a GPU's error, lack of memory), on all nodes together. It does not
heal node 0 or its launcher, a node that does not come back, or an error that comes again, as a refusal does.

examples
  DATASET=digits MODEL=JiT-Demo/8 EPOCHS=32 NUM_IMAGES=500 bash run_jit_multinode.sh --lr 5e-4 --ema_decay1 0.99
  DATA_PATH=./data/imagenet MODEL=JiT-B/16 GLOBAL_BATCH=1024 OUTPUT_DIR=output/b16 bash run_jit_multinode.sh
  DATA_PATH=/data/imagenet sbatch --nodes=2 --ntasks-per-node=1 --gres=gpu:8 --cpus-per-task=64 run_jit_multinode.sh
HELP
}

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    help
    exit 0
fi

# ---- check what was asked: once, before anything is started on any node ----------------------

for name in DRY_RUN AUTO_SRUN REQUEUE ONLINE_EVAL EVALUATE_GEN ENABLE_WANDB; do
    case "${!name:-}" in
        '' | 0 | 1) ;;
        *) die "$name is '${!name}': it must be 0 or 1." ;;
    esac
done

if [[ ${REQUEUE:-0} == 1 && -z ${SLURM_JOB_ID:-} ]]; then
    die "REQUEUE=1 puts a SLURM job back into the queue, and this is none: submit it with sbatch or unset REQUEUE."
fi
if [[ -n ${MAX_RESTARTS:-} ]] && ! [[ $MAX_RESTARTS =~ ^(0|[1-9][0-9]*)$ ]]; then
    die "MAX_RESTARTS is '$MAX_RESTARTS': it must be an integer, the number of restarts after a failure."
fi

if [[ -n ${RESUME:-} ]] && [[ -f $RESUME || $RESUME == *.pth || $RESUME == *.dcp || -f $RESUME/checkpoint.json ]]; then
    die "RESUME is '$RESUME', a checkpoint itself or a file: it must be the folder that holds the checkpoint."
fi

# has_checkpoint FOLDER: whether there is one of the names of util/checkpoint_folder.py in it.
has_checkpoint() {
    local path
    for path in "$1"/checkpoint-{last,step*,epoch*}.pth "$1"/checkpoint-{last,next,step*,epoch*}.dcp/checkpoint.json; do
        if [[ -f $path ]]; then return 0; fi
    done
    return 1
}

dataset=${DATASET:-}  # here only to see whether data is needed
needs_data=1
if [[ ${EVALUATE_GEN:-} == 1 ]]; then needs_data=0; fi
for folder in "${OUTPUT_DIR:-}" "${RESUME:-}"; do  # a run that goes on has its data set in its checkpoint
    if [[ -n $folder ]] && has_checkpoint "$folder"; then needs_data=0; fi
done
previous=
for flag in "$@"; do
    if [[ $previous == --dataset ]]; then dataset=$flag; fi
    if [[ $previous == --resume || $previous == --output_dir ]] && has_checkpoint "$flag"; then
        needs_data=0
    fi
    case "$flag" in
        --dataset=*) dataset=${flag#*=} ;;
        --data_path | --data_path=* | --sample | --sample=* | --evaluate_gen | -h | --help) needs_data=0 ;;
    esac
    previous=$flag
done
data_path=${DATA_PATH:-${DATA_ROOT:-}}
if [[ -z $data_path && (-z $dataset || $dataset == imagefolder) ]]; then data_path=${IMAGENET_ROOT:-}; fi
if [[ -n $data_path ]]; then needs_data=0; fi
if ((needs_data)) && [[ -z $dataset || $dataset == imagefolder ]]; then
    die "no dataset: set DATA_PATH (or DATA_ROOT, or IMAGENET_ROOT) to the folder that holds train/;" \
        "DATASET=digits needs none."
fi

# ---- find main_jit.py: sbatch runs a copy of this script from its spool folder ---------------

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
root=
for folder in "$here" "${JIT_DIR:-}" "${SLURM_SUBMIT_DIR:-}"; do
    if [[ -n $folder && -f $folder/main_jit.py ]]; then
        root=$(readlink -f -- "$folder")
        break
    fi
done
if [[ -z $root ]]; then
    die "main_jit.py is not beside this script ($here), nor in JIT_DIR or SLURM_SUBMIT_DIR:" \
        "set JIT_DIR to its folder."
fi

# ---- nodes -----------------------------------------------------------------------------------

if [[ -n ${NNODES:-} && -n ${WORLD_SIZE:-} && $NNODES != "$WORLD_SIZE" ]]; then
    die "NNODES is $NNODES and WORLD_SIZE is $WORLD_SIZE: both are the number of nodes, set one of them."
fi

# Already inside an srun step? The batch script and the shell of salloc may carry a step number
# as well, but theirs are not ordinary ones: SLURM numbers ordinary steps up to 0xfffffff0.
in_step=0
if [[ -n ${SLURM_JOB_ID:-} && ${SLURM_STEP_ID:-} =~ ^[0-9]+$ ]] && ((10#$SLURM_STEP_ID <= 0xfffffff0)); then
    in_step=1
fi

# The nodes that SLURM gave. A step may have fewer of them than its job, and SLURM_NODEID counts
# within the step; but whoever sets NODE_RANK, one srun per node, counts within the job.
slurm_nodes=${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}
slurm_list=${SLURM_JOB_NODELIST:-}
if ((in_step)) && [[ -z ${NODE_RANK:-} ]]; then
    slurm_nodes=${SLURM_STEP_NUM_NODES:-$slurm_nodes}
    slurm_list=${SLURM_STEP_NODELIST:-$slurm_list}
fi
nnodes=${NNODES:-${WORLD_SIZE:-$slurm_nodes}}
if ! [[ $nnodes =~ ^[1-9][0-9]*$ ]]; then
    die "the number of nodes (NNODES, WORLD_SIZE) is '$nnodes': it must be a positive integer."
fi

# JIT_SRUN_JOB, the job in which srun was started from here, is a second guard against doing it
# twice. It names the job because a job submitted from within a step inherits the environment.
if [[ ${AUTO_SRUN:-1} == 1 && -n ${SLURM_JOB_ID:-} && ${JIT_SRUN_JOB:-} != "${SLURM_JOB_ID:-}" ]] &&
    ((!in_step && slurm_nodes > 1 && nnodes > 1)); then
    if ((nnodes > slurm_nodes)); then
        die "$nnodes nodes were asked for (NNODES, WORLD_SIZE), and the SLURM allocation has $slurm_nodes."
    fi
    script=$root/run_jit_multinode.sh  # the other nodes do not have the spool copy
    if [[ ! -f $script ]]; then die "$script is missing: srun needs it on every node."; fi
    # --export=ALL: after `sbatch --export=NONE` srun would start the step without these variables.
    # --wait: a node that fails at once would leave the others waiting for it; but the nodes of a job that was asked
    # to stop end a moment apart, each with exit code 75, and --kill-on-bad-exit would not give them that moment. And
    # srun takes the number of processors from nowhere but its own command line.
    command=(srun --nodes="$nnodes" --ntasks="$nnodes" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0 --wait=60
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash "$script" "$@")
    # One rank cannot be right for every node: there it comes from SLURM.
    if [[ -n ${NODE_RANK:-} ]]; then command=(env -u NODE_RANK "${command[@]}"); fi
    export JIT_SRUN_JOB=$SLURM_JOB_ID
    unset JIT_STATE_DIR
    ends_it=TERM
    make_state
    start "$nnodes nodes" "${command[@]}"
    requeue
    exit "$code"
fi

if ((in_step)) && [[ ${SLURM_LOCALID:-0} != 0 ]]; then
    die "srun started this script more than once on this node: use --ntasks-per-node=1," \
        "torchrun starts one process per GPU."
fi

node_rank=${NODE_RANK:-}
if [[ -z $node_rank ]]; then
    node_rank=0
    if ((nnodes > 1)); then node_rank=${SLURM_NODEID:-0}; fi
fi
if ! [[ $node_rank =~ ^(0|[1-9][0-9]*)$ ]] || ((node_rank >= nnodes)); then
    die "NODE_RANK is '$node_rank': with $nnodes node(s) it must be an integer from 0 to $((nnodes - 1))."
fi

if ((nnodes == 1)) && [[ -z ${MASTER_PORT:-} ]]; then
    # torchrun finds a free port. The address spares looking up a host name that may not resolve.
    rendezvous=(--standalone --local_addr=127.0.0.1)
else
    if [[ -n ${MASTER_ADDR:-} ]]; then
        master_addr=$MASTER_ADDR
    elif ((nnodes == 1)); then
        master_addr=127.0.0.1
    elif [[ -n ${SLURM_JOB_ID:-} && -n $slurm_list ]] && ((slurm_nodes > 1)); then
        hosts=$(scontrol show hostnames "$slurm_list") || die "scontrol could not list the nodes: set MASTER_ADDR."
        master_addr=${hosts%%$'\n'*}
    elif ((node_rank == 0)); then
        master_addr=$(hostname)
    else
        die "MASTER_ADDR is not set: node $node_rank of $nnodes must know the host name or address of node 0."
    fi
    rendezvous=(--nnodes="$nnodes" --node_rank="$node_rank"
        --master_addr="$master_addr" --master_port="${MASTER_PORT:-29500}")
    if [[ -n ${MAX_RESTARTS:-} ]]; then  # the static rendezvous takes place once
        rendezvous=(--nnodes="$nnodes" --rdzv_backend=c10d --rdzv_endpoint="$master_addr:${MASTER_PORT:-29500}"
            --rdzv_id="${SLURM_JOB_ID:-jit}" --rdzv_conf="is_host=$((node_rank == 0))"
            ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"})
    fi
fi
if [[ -n ${MAX_RESTARTS:-} ]]; then
    rendezvous+=(--max_restarts="$MAX_RESTARTS")
    # torch 2.11 otherwise gives the processes of a restart the store of those before, with their addresses in it.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# ---- interpreter: torchrun is run as a module of it, so never another environment's ----------

if [[ -n ${CONDA_ENV_PATH:-} ]]; then
    python=$CONDA_ENV_PATH/bin/python
    if [[ ! -x $python ]]; then die "CONDA_ENV_PATH is '$CONDA_ENV_PATH', which has no bin/python."; fi
    export PATH=$CONDA_ENV_PATH/bin:$PATH
elif [[ -n ${PYTHON:-} ]]; then
    python=$PYTHON
elif [[ -n ${VIRTUAL_ENV:-} && -x $VIRTUAL_ENV/bin/python ]]; then
    python=$VIRTUAL_ENV/bin/python
elif [[ -n ${CONDA_PREFIX:-} && ${CONDA_DEFAULT_ENV:-} != base && -x $CONDA_PREFIX/bin/python ]]; then
    python=$CONDA_PREFIX/bin/python  # conda's base is active on many machines without being meant
elif [[ -x $root/.venv/bin/python ]]; then
    python=$root/.venv/bin/python
else
    python=python3
fi
if ! type -P -- "$python" >/dev/null; then die "the interpreter '$python' was not found (see PYTHON in --help)."; fi

# ---- processes on this node ------------------------------------------------------------------

visible=0  # CUDA devices that the processes will see
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=', ' read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
    for device in ${devices[@]+"${devices[@]}"}; do
        case "$device" in
            -1 | NoDevFiles) break ;;  # CUDA ignores what follows; SLURM without GPUs writes NoDevFiles
            *) visible=$((visible + 1)) ;;
        esac
    done
elif type -P nvidia-smi >/dev/null; then
    visible=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
fi
num_gpus=${NUM_GPUS:-$((visible > 0 ? visible : 1))}
if ! [[ $num_gpus =~ ^[1-9][0-9]*$ ]]; then
    die "NUM_GPUS is '$num_gpus': it must be a positive integer, the number of processes on this node."
fi
if ((visible > 0 && num_gpus > visible)); then
    die "NUM_GPUS is $num_gpus, and $visible CUDA device(s) are visible here."
fi

# ---- the command -----------------------------------------------------------------------------

settings=()
# pass VARIABLE --flag: the flag and its value, where the variable is set and not empty.
pass() {
    if [[ -n ${!1:-} ]]; then settings+=("$2" "${!1}"); fi
}
pass data_path --data_path
for name in MODEL IMG_SIZE NOISE_SCALE PRED_PARAM BATCH_SIZE BLR EPOCHS WARMUP_EPOCHS \
    GEN_BSZ NUM_IMAGES CFG INTERVAL_MIN INTERVAL_MAX DATASET GLOBAL_BATCH OUTPUT_DIR RESUME \
    WANDB_PROJECT WANDB_ENTITY WANDB_RUN_NAME WANDB_NUM_VIS; do
    pass "$name" "--$(tr '[:upper:]' '[:lower:]' <<<"$name")"
done
if [[ ${ENABLE_WANDB:-1} == 0 ]]; then settings+=(--wandb_mode disabled); else pass WANDB_MODE --wandb_mode; fi
if [[ ${ONLINE_EVAL:-} == 1 ]]; then settings+=(--online_eval); fi
if [[ ${ONLINE_EVAL:-} == 0 ]]; then settings+=(--no-online_eval); fi
if [[ ${EVALUATE_GEN:-} == 1 ]]; then settings+=(--evaluate_gen); fi

# ---- run it ----------------------------------------------------------------------------------

make_state
export JIT_STATE_DIR=$state
# torchrun answers the signals that it handles by ending its workers. USR2, which ends them in whatever call they
# are, is kept for that.
export PET_SIGNALS_TO_HANDLE=SIGUSR2
ends_it=USR2
start "node $node_rank of $nnodes, $num_gpus process(es)" \
    "$python" -m torch.distributed.run --nproc_per_node="$num_gpus" "${rendezvous[@]}" \
    "$root/main_jit.py" ${settings[@]+"${settings[@]}"} "$@"

# torchrun says no more than that a process failed; what they recorded says why. A failure outweighs a 75.
failure=$code preempted=0
for file in "$JIT_STATE_DIR"/exit-*; do
    if [[ ! -f $file ]]; then continue; fi
    read -r recorded <"$file"
    if ((recorded == 75)); then preempted=1; elif ((recorded > failure)); then failure=$recorded; fi
done
code=$((failure == 0 && preempted ? 75 : failure))
if ((node_rank == 0)) && [[ ${JIT_SRUN_JOB:-} != "${SLURM_JOB_ID:-none}" ]]; then requeue; fi
exit "$code"
