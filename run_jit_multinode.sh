#!/usr/bin/env bash
# Starts main_jit.py with torchrun: places the nodes (srun, once), chooses interpreter and number of processes, and
# becomes one command, tools/launch.py. That one makes flags of the environment and handles signals and requeues.
set -euo pipefail

die() {
    printf 'run_jit_multinode.sh: error: %s\n' "$*" >&2
    exit 2
}

# number NAME VALUE LEAST: print a decimal number, without leading zeros. bash evaluates what is no number as code.
number() {
    [[ $2 =~ ^[0-9]{1,9}$ && $((10#$2)) -ge $3 ]] || die "$1 is '$2': it must be an integer of at least $3."
    printf '%s' "$((10#$2))"
}

trap 'exit 75' TERM HUP USR1 INT  # asked to stop before anything has started

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'HELP'
usage: [VARIABLE=value ...] bash run_jit_multinode.sh [flags of main_jit.py ...]

Starts main_jit.py with torchrun. Each flag in `python main_jit.py --help` is also a variable, in upper case: LR=1e-4 is
--lr 1e-4, and a switch is 1 or 0. A variable that is unset or empty passes nothing, so the defaults are main_jit.py's.
Flags after the script name win over variables. Most used are MODEL, DATASET, DATA_PATH, IMG_SIZE, GLOBAL_BATCH,
BATCH_SIZE, BLR, EPOCHS, OUTPUT_DIR, OUTPUT_ROOT, RESUME, EVALUATE_GEN, ONLINE_EVAL, NUM_IMAGES and CFG.

These variables are no flags:

variable                    default                 meaning
DATA_ROOT, IMAGENET_ROOT    -                       older names of DATA_PATH; the latter for ImageFolder only
ENABLE_WANDB                1                       0 means --wandb_mode disabled
WANDB_API_KEY               -                       stays in the environment: never on a command line, never in a log
NUM_GPUS                    detected, else 1        processes per node, detected from
                                                    CUDA_VISIBLE_DEVICES, then nvidia-smi
NNODES, WORLD_SIZE          SLURM's, else 1         number of NODES; WORLD_SIZE is the older name
NODE_RANK                   RANK, SLURM's, else 0   number of this node
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
DRY_RUN                     0                       1 checks settings, checkpoint, data and what metrics
                                                    need, prints the command and starts nothing

TERM, HUP, USR1 and Ctrl-C: training stops after the current step and writes a checkpoint, an evaluation keeps what it
has; a second Ctrl-C stops at once. With srun, which starts this on each of several nodes, USR1 is forwarded
(sbatch --signal=B:USR1@300), scancel saves within SLURM's KillWait, and Ctrl-C twice within a second asks to stop.
Exit code: 75 when asked to stop (the same command resumes), 2 for what a sentence explains, 130 when stopped at once,
else 1. MAX_RESTARTS heals a process that died (a GPU's error, lack of memory), on all nodes together; not node 0 or its
launcher, a node that does not come back, or an error that comes again.

examples
  DATASET=digits MODEL=JiT-Demo/8 EPOCHS=32 NUM_IMAGES=500 bash run_jit_multinode.sh --lr 5e-4 --ema_decay1 0.99
  DATA_PATH=./data/imagenet MODEL=JiT-B/16 GLOBAL_BATCH=1024 OUTPUT_DIR=output/b16 bash run_jit_multinode.sh
  DATA_PATH=/data/imagenet sbatch --nodes=2 --ntasks-per-node=1 --gres=gpu:8 --cpus-per-task=64 run_jit_multinode.sh
HELP
    exit 0
fi

for name in AUTO_SRUN REQUEUE DRY_RUN; do
    if [[ ! ${!name:-} =~ ^[01]?$ ]]; then die "$name is '${!name}': it must be 0 or 1."; fi
done
[[ ${REQUEUE:-0} == 0 || -n ${SLURM_JOB_ID:-} ]] ||
    die "REQUEUE=1 puts a SLURM job back into the queue, and this is none: submit it with sbatch or unset REQUEUE."
max_restarts=$(number MAX_RESTARTS "${MAX_RESTARTS:-0}" 0)

# ---- find main_jit.py: sbatch runs a copy of this script from its spool folder ---------------

here=$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")
root=
for folder in "$here" "${JIT_DIR:-}" "${SLURM_SUBMIT_DIR:-}"; do
    if [[ -z $root && -n $folder && -f $folder/main_jit.py ]]; then root=$(readlink -f -- "$folder"); fi
done
[[ -n $root ]] ||
    die "main_jit.py is not beside this script ($here), nor in JIT_DIR or SLURM_SUBMIT_DIR: set JIT_DIR to its folder."

# ---- nodes -----------------------------------------------------------------------------------

[[ ${NNODES:-${WORLD_SIZE:-}} == "${WORLD_SIZE:-${NNODES:-}}" ]] ||
    die "NNODES is $NNODES and WORLD_SIZE is $WORLD_SIZE: both are the number of nodes, set one of them."

# Already inside an srun step? The batch script and the shell of salloc may carry a step number as well, but SLURM
# numbers ordinary steps up to 0xfffffff0.
in_step=0
[[ -z ${SLURM_JOB_ID:-} || ! ${SLURM_STEP_ID:-} =~ ^[0-9]{1,10}$ ]] || in_step=$((10#$SLURM_STEP_ID <= 0xfffffff0))

# The nodes that SLURM gave. A step may have fewer than its job, and SLURM_NODEID counts within the step; but whoever
# sets NODE_RANK, one srun per node, counts within the job.
slurm_nodes=${SLURM_NNODES:-${SLURM_JOB_NUM_NODES:-1}}
slurm_list=${SLURM_JOB_NODELIST:-}
if ((in_step)) && [[ -z ${NODE_RANK:-} ]]; then
    slurm_nodes=${SLURM_STEP_NUM_NODES:-$slurm_nodes}
    slurm_list=${SLURM_STEP_NODELIST:-$slurm_list}
fi
slurm_nodes=$(number "SLURM's number of nodes" "$slurm_nodes" 1)
nnodes=$(number "NNODES (or WORLD_SIZE), the number of nodes," "${NNODES:-${WORLD_SIZE:-$slurm_nodes}}" 1)

# JIT_SRUN_JOB, the job in which srun was started from here, is a second guard against doing it twice. It names the job
# because a job submitted from within a step inherits the environment.
if [[ ${AUTO_SRUN:-1} == 1 && -n ${SLURM_JOB_ID:-} && ${JIT_SRUN_JOB:-} != "${SLURM_JOB_ID:-}" ]] &&
    ((!in_step && slurm_nodes > 1 && nnodes > 1)); then
    ((nnodes <= slurm_nodes)) ||
        die "$nnodes nodes were asked for (NNODES, WORLD_SIZE), and the SLURM allocation has $slurm_nodes."
    script=$root/run_jit_multinode.sh  # the other nodes do not have the spool copy
    [[ -f $script ]] || die "$script is missing: srun needs it on every node."
    # --export=ALL: after `sbatch --export=NONE` srun would start the step without these variables. --wait: a node that
    # fails would leave the others waiting for it; but nodes that were asked to stop end a moment apart, with exit code
    # 75, which --kill-on-bad-exit would not allow. srun takes the number of processors from its command line alone.
    # NODE_RANK, if set, cannot be right for every node.
    command=(env -u NODE_RANK JIT_SRUN_JOB="$SLURM_JOB_ID" srun --nodes="$nnodes" --ntasks="$nnodes"
        --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=0 --wait=60
        ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} bash "$script" "$@")
    if [[ ${DRY_RUN:-0} != 1 ]]; then exec "${command[@]}"; fi
    printf '%q ' "${command[@]}" && echo
    unset NODE_RANK  # what the first node would start is checked below
fi

((!in_step)) || [[ ${SLURM_LOCALID:-0} == 0 ]] ||
    die "srun started this script more than once on this node: use --ntasks-per-node=1 (torchrun forks)."
node_rank=${NODE_RANK:-}
if [[ -z $node_rank ]] && ((nnodes > 1)); then node_rank=${RANK:-${SLURM_NODEID:-0}}; fi
node_rank=$(number NODE_RANK "${node_rank:-0}" 0)
((node_rank < nnodes)) || die "NODE_RANK is $node_rank: with $nnodes node(s) it must be at most $((nnodes - 1))."

if ((nnodes == 1)) && [[ -z ${MASTER_PORT:-} ]]; then
    # torchrun finds a free port. The address spares looking up a host name that may not resolve.
    rendezvous=(--standalone --local_addr=127.0.0.1)
else
    master_addr=127.0.0.1  # one node needs no name, which may not resolve
    if ((nnodes > 1)); then master_addr=${MASTER_ADDR:-127.0.0.1}; fi
    if [[ -z ${MASTER_ADDR:-} ]] && ((nnodes > 1)); then
        if [[ -n ${SLURM_JOB_ID:-} && -n $slurm_list ]] && ((slurm_nodes > 1)); then
            hosts=$(scontrol show hostnames "$slurm_list") || die "scontrol could not list the nodes: set MASTER_ADDR."
            master_addr=${hosts%%$'\n'*}
        elif ((node_rank == 0)); then
            master_addr=$(hostname)
        else
            die "MASTER_ADDR is not set: node $node_rank of $nnodes must know the host name or address of node 0."
        fi
    fi
    port=$(number MASTER_PORT "${MASTER_PORT:-29500}" 1)
    ((port < 65536)) || die "MASTER_PORT is $port: ports end at 65535."
    rendezvous=(--nnodes="$nnodes" --node_rank="$node_rank" --master_addr="$master_addr" --master_port="$port")
    if [[ -n ${MAX_RESTARTS:-} ]]; then  # the static rendezvous takes place once
        rendezvous=(--nnodes="$nnodes" --rdzv_backend=c10d --rdzv_endpoint="$master_addr:$port"
            --rdzv_id="${SLURM_JOB_ID:-jit}" --rdzv_conf="is_host=$((node_rank == 0))"
            ${LOCAL_ADDR:+--local_addr="$LOCAL_ADDR"})
    fi
fi
if [[ -n ${MAX_RESTARTS:-} ]]; then
    rendezvous+=(--max_restarts="$max_restarts")
    # torch 2.11 otherwise gives the processes of a restart the store of those before, with their addresses in it.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi

# ---- interpreter: torchrun is a module of it, so never another environment's -----------------

python=python3
if [[ ${CONDA_DEFAULT_ENV:-} == base ]]; then CONDA_PREFIX=; fi  # often active without being meant
for folder in "$root/.venv" "${CONDA_PREFIX:-}" "${VIRTUAL_ENV:-}"; do
    if [[ -n $folder && -x $folder/bin/python ]]; then python=$folder/bin/python; fi
done
python=${PYTHON:-$python}
if [[ -n ${CONDA_ENV_PATH:-} ]]; then
    python=$CONDA_ENV_PATH/bin/python
    [[ -x $python ]] || die "CONDA_ENV_PATH is '$CONDA_ENV_PATH', which has no bin/python."
    export PATH=$CONDA_ENV_PATH/bin:$PATH
fi
type -P -- "$python" >/dev/null || die "the interpreter '$python' was not found (see PYTHON in --help)."

# ---- processes on this node ------------------------------------------------------------------

visible=0  # CUDA devices that the processes will see
if [[ -n ${CUDA_VISIBLE_DEVICES+set} ]]; then
    IFS=', ' read -r -a devices <<<"$CUDA_VISIBLE_DEVICES"
    for device in ${devices[@]+"${devices[@]}"}; do
        # CUDA ignores what follows a -1; SLURM without GPUs writes NoDevFiles
        if [[ $device == -1 || $device == NoDevFiles ]]; then break; fi
        visible=$((visible + 1))
    done
elif type -P nvidia-smi >/dev/null; then
    visible=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU ') || true
fi
num_gpus=$(number NUM_GPUS "${NUM_GPUS:-$((visible > 0 ? visible : 1))}" 1)
((visible == 0 || num_gpus <= visible)) || die "NUM_GPUS is $num_gpus, and $visible CUDA device(s) are visible here."

# ---- the command -----------------------------------------------------------------------------

if ((node_rank != 0)); then export REQUEUE=0; fi  # the first node does it for the job
# Signals wait until Python takes them. -P: a folder util/ in the working directory is not ours.
block=
if env --block-signal=TERM true 2>/dev/null; then block=--block-signal=TERM,HUP,USR1,INT,QUIT; fi
exec env ${block:+"$block"} PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" \
    "$python" -P -m tools.launch --nproc_per_node="$num_gpus" "${rendezvous[@]}" "$root/main_jit.py" "$@"
