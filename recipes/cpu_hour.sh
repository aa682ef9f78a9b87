#!/usr/bin/env bash
# CIFAR-10 in an hour on one thread of a CPU: JiT-Ti/4 with Spectral Forcing, or METHOD=plain. `make cifar10` fetches the images.
#   bash recipes/cpu_hour.sh
source "$(dirname "$0")/common.sh" sf: plain:DISABLE_DCT_PATCHIFY=1
default OMP_NUM_THREADS=1 DATASET=cifar10 MODEL=JiT-Ti/4 BATCH_SIZE=64 EPOCHS=5 WARMUP_EPOCHS=0.5
default LR=5e-4 LR_SCHEDULE=cosine MIN_LR=5e-5 EMA_DECAY1=0.999 PRECISION=bf16 SAVE_LAST_FREQ=1
default CFG=2.0 NUM_SAMPLING_STEPS=25 WANDB_NUM_VIS=100 ONLINE_EVAL=0
launch "$@"
