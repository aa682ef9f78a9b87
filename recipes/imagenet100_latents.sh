#!/usr/bin/env bash
# SpectralDiT on ImageNet-100 in the latent space of a VAE (arXiv 2606.18765). METHOD=plain: without its correction of blocks;
# METHOD=sf: Spectral Forcing instead. docs/latents.md says how to make the latents, and what is our choice.
#   DATA_PATH=/data/imagenet100-latents bash recipes/imagenet100_latents.sh
source "$(dirname "$0")/common.sh" residual="--disable_dct_patchify --spectral_residual time" \
  plain=--disable_dct_patchify sf=
export DATASET=latents MODEL=${MODEL:-JiT-S/2} PRED_PARAM=v GLOBAL_BATCH=${GLOBAL_BATCH:-256} EPOCHS=${EPOCHS:-810}
export CFG=${CFG:-2.0} INTERVAL_MIN=${INTERVAL_MIN:-0} EVAL_FREQ=${EVAL_FREQ:-90}
launch --t_sampler uniform --t_eps 0 --lr 1e-4 --lr_schedule cosine --min_lr 1e-5 --warmup_steps 5000 --beta2 0.99 \
  --grad_clip 1 --sampling_method euler --num_sampling_steps 50 "$@"
