#!/usr/bin/env bash
# SpectralDiT on ImageNet-100 in the latent space of a VAE (arXiv 2606.18765). METHOD=plain: without its correction of blocks;
# METHOD=sf: Spectral Forcing instead. docs/latents.md says how to make the latents, and what is our choice.
#   DATA_PATH=/data/imagenet100-latents bash recipes/imagenet100_latents.sh
source "$(dirname "$0")/common.sh" residual:"DISABLE_DCT_PATCHIFY=1 SPECTRAL_RESIDUAL=time" plain:DISABLE_DCT_PATCHIFY=1 sf:
default DATASET=latents MODEL=JiT-S/2 PRED_PARAM=v T_SAMPLER=uniform T_EPS=0
default GLOBAL_BATCH=256 EPOCHS=810 LR=1e-4 LR_SCHEDULE=cosine MIN_LR=1e-5 WARMUP_STEPS=5000 BETA2=0.99 GRAD_CLIP=1
default CFG=2.0 INTERVAL_MIN=0 SAMPLING_METHOD=euler NUM_SAMPLING_STEPS=50 EVAL_FREQ=90
launch "$@"
