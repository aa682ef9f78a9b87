#!/usr/bin/env bash
# SpectralDiT on CIFAR-10 (arXiv 2606.18765): 400,000 steps of batch 256 at patch 1, or MODEL=JiT-Ti/2. METHOD=plain: without
# the correction. docs/from-the-release.md says in what the released code differs. `make cifar10` fetches the images.
#   bash recipes/spectraldit_cifar10.sh
source "$(dirname "$0")/common.sh" residual:SPECTRAL_RESIDUAL=time plain:
default DATASET=cifar10 FLIP=0 MODEL=JiT-Ti/1 DISABLE_DCT_PATCHIFY=1 PRED_PARAM=v T_SAMPLER=uniform T_EPS=0
default GLOBAL_BATCH=256 EPOCHS=2052 LR=1e-4 LR_SCHEDULE=cosine MIN_LR=1e-5 WARMUP_STEPS=5000 BETA2=0.99 GRAD_CLIP=1
default CFG=1.0 SAMPLING_METHOD=euler NUM_SAMPLING_STEPS=50 ONLINE_EVAL=0
launch "$@"
