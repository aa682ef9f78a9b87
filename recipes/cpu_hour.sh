#!/usr/bin/env bash
# CIFAR-10 in an hour on one thread of a CPU: JiT-Ti/4 with Spectral Forcing, or METHOD=plain. `make cifar10` fetches the images.
#   bash recipes/cpu_hour.sh
source "$(dirname "$0")/common.sh" sf= plain=--disable_dct_patchify
export DATASET=cifar10 MODEL=JiT-Ti/4 BATCH_SIZE=${BATCH_SIZE:-64} EPOCHS=${EPOCHS:-5} WARMUP_EPOCHS=${WARMUP_EPOCHS:-0.5}
export CFG=${CFG:-2.0} WANDB_NUM_VIS=${WANDB_NUM_VIS:-100} ONLINE_EVAL=${ONLINE_EVAL:-0} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
launch --lr 5e-4 --lr_schedule cosine --min_lr 5e-5 --ema_decay1 0.999 --num_sampling_steps 25 --precision bf16 \
  --save_last_freq 1 "$@"
