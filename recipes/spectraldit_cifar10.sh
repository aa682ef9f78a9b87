#!/usr/bin/env bash
# SpectralDiT on CIFAR-10 (arXiv 2606.18765): 400,000 steps of batch 256 at patch 1, or MODEL=JiT-Ti/2. METHOD=plain: without
# the correction. docs/from-the-release.md says in what the released code differs. `make cifar10` fetches the images.
#   bash recipes/spectraldit_cifar10.sh
source "$(dirname "$0")/common.sh" residual="--spectral_residual time" plain=
export DATASET=cifar10 MODEL=${MODEL:-JiT-Ti/1} GLOBAL_BATCH=${GLOBAL_BATCH:-256} EPOCHS=${EPOCHS:-2052} PRED_PARAM=v
export CFG=${CFG:-1.0} ONLINE_EVAL=${ONLINE_EVAL:-0}
launch --disable_dct_patchify --t_sampler uniform --t_eps 0 --no-flip --lr 1e-4 --lr_schedule cosine --min_lr 1e-5 \
  --warmup_steps 5000 --beta2 0.99 --grad_clip 1 --sampling_method euler --num_sampling_steps 50 "$@"
