#!/usr/bin/env bash
# Spectral noise schedules on CIFAR-10 (arXiv 2603.19222, as derived in docs/spectral_schedules.md): times of training and
# sampling from the spectrum of each image, or METHOD=global: from that of the data set; METHOD=plain: JiT's own times.
# The settings of the network are ours. `make cifar10` fetches the images, `python -m tools.measure_spectrum --dataset cifar10`
# measures their spectrum.
#   bash recipes/spectral_schedules_cifar10.sh
source "$(dirname "$0")/common.sh" \
  instance:"T_SAMPLER=spectral_instance SAMPLING_GRID=spectral_instance" \
  global:"T_SAMPLER=spectral_global SAMPLING_GRID=spectral_global" plain:
default DATASET=cifar10 MODEL=JiT-Ti/4 DISABLE_DCT_PATCHIFY=1 GLOBAL_BATCH=256 EPOCHS=600 GRAD_CLIP=1 ONLINE_EVAL=0
launch "$@"
