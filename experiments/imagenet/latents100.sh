#!/usr/bin/env bash
# ImageNet-100 in the latent space of a VAE, after SpectralDiT (arXiv 2606.18765): METHOD=residual (its correction of blocks,
# the default), plain, or sf (Spectral Forcing instead). docs/latents.md says how to make the latents, and what is our choice.
#   DATA_PATH=/data/imagenet100-latents METHOD=plain bash experiments/imagenet/latents100.sh
# Other variables and flags are those of run_jit_multinode.sh; DRY_RUN=1 checks everything first.
set -euo pipefail
method=${METHOD:-residual}
case $method in
    residual) flags=(--disable_dct_patchify --spectral_residual time) ;;
    plain) flags=(--disable_dct_patchify) ;;
    sf) flags=() ;;
    *) echo "METHOD is '$method'; it must be residual, plain or sf" >&2 && exit 2 ;;
esac
unset METHOD
export DATASET=latents MODEL=${MODEL:-JiT-S/2} PRED_PARAM=v GLOBAL_BATCH=${GLOBAL_BATCH:-256} EPOCHS=${EPOCHS:-810}
export CFG=${CFG:-2.0} INTERVAL_MIN=${INTERVAL_MIN:-0} EVAL_FREQ=${EVAL_FREQ:-90}
export OUTPUT_DIR=${OUTPUT_DIR:-output/imagenet100-${MODEL//\//}-$method-$EPOCHS}
exec bash "$(dirname "$0")/../../run_jit_multinode.sh" --t_sampler uniform --t_eps 0 --lr 1e-4 --lr_schedule cosine \
  --min_lr 1e-5 --warmup_steps 5000 --beta2 0.99 --grad_clip 1 --sampling_method euler --num_sampling_steps 50 \
  "${flags[@]}" "$@"
