#!/usr/bin/env bash
# CIFAR-10 on one GPU: JiT-S/4 with Spectral Forcing, or METHOD=plain. 5.0e16 operations, eight minutes at 100 TFLOP/s; the time
# itself has not been measured. `make cifar10` fetches the images.
#   bash recipes/gpu_ten_minutes.sh
source "$(dirname "$0")/common.sh" sf: plain:DISABLE_DCT_PATCHIFY=1
default DATASET=cifar10 MODEL=JiT-S/4 BATCH_SIZE=512 EPOCHS=100 LR=1e-3 LR_SCHEDULE=cosine MIN_LR=1e-5 EMA_DECAY1=0.999
default CFG=2.0 NUM_SAMPLING_STEPS=25 WANDB_NUM_VIS=100 ONLINE_EVAL=0
launch "$@"
