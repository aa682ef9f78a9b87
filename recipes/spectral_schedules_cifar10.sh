#!/usr/bin/env bash
# Spectral noise schedules on CIFAR-10 (arXiv 2603.19222, as derived in docs/spectral_schedules.md): times of training and
# sampling from the spectrum of each image, or METHOD=global: from that of the data set; METHOD=plain: JiT's own times.
# The settings of the network are ours. `make cifar10` fetches the images, `python -m tools.measure_spectrum --dataset cifar10`
# measures their spectrum.
#   bash recipes/spectral_schedules_cifar10.sh
source "$(dirname "$0")/common.sh" \
  instance="--t_sampler spectral_instance --sampling_grid spectral_instance" \
  global="--t_sampler spectral_global --sampling_grid spectral_global" plain=
export DATASET=cifar10 MODEL=${MODEL:-JiT-Ti/4} GLOBAL_BATCH=${GLOBAL_BATCH:-256} EPOCHS=${EPOCHS:-600}
export ONLINE_EVAL=${ONLINE_EVAL:-0}
launch --disable_dct_patchify --grad_clip 1 "$@"
