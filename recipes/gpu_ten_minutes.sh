#!/usr/bin/env bash
# CIFAR-10 on one GPU: JiT-S/4 with Spectral Forcing, or METHOD=plain. 5.0e16 operations, eight minutes at 100 TFLOP/s; the time
# itself has not been measured. `make cifar10` fetches the images.
#   bash recipes/gpu_ten_minutes.sh
source "$(dirname "$0")/common.sh" sf= plain=--disable_dct_patchify
export DATASET=cifar10 MODEL=JiT-S/4 BATCH_SIZE=${BATCH_SIZE:-512} EPOCHS=${EPOCHS:-100} CFG=${CFG:-2.0}
export WANDB_NUM_VIS=${WANDB_NUM_VIS:-100} ONLINE_EVAL=${ONLINE_EVAL:-0}
launch --lr 1e-3 --lr_schedule cosine --min_lr 1e-5 --ema_decay1 0.999 --num_sampling_steps 25 "$@"
