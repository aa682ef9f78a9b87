#!/usr/bin/env bash
# 130M/32 on ImageNet 256 x 256, as in arXiv 2606.15236: METHOD=sf (Spectral Forcing, the default) or METHOD=plain (JiT).
#   DATA_PATH=/data/imagenet METHOD=plain EPOCHS=600 bash experiments/imagenet/130m_32.sh
# Other variables and flags are those of run_jit_multinode.sh; DRY_RUN=1 checks everything first.
set -euo pipefail
method=${METHOD:-sf}
case $method in
    sf) flags=() ;;
    plain) flags=(--disable_dct_patchify) ;;
    *) echo "METHOD is '$method'; it must be sf or plain" >&2 && exit 2 ;;
esac
unset METHOD
export MODEL=JiT-B/32 GLOBAL_BATCH=${GLOBAL_BATCH:-1024} EPOCHS=${EPOCHS:-200} EVAL_FREQ=${EVAL_FREQ:-40}
export OUTPUT_DIR=${OUTPUT_DIR:-output/imagenet-jit-b32-$method-$EPOCHS}
exec bash "$(dirname "$0")/../../run_jit_multinode.sh" "${flags[@]}" "$@"
