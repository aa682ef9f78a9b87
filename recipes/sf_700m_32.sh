#!/usr/bin/env bash
# Spectral Forcing, 700M/32 on ImageNet 256 x 256 (arXiv 2606.15236), 200 epochs or EPOCHS=600. METHOD=plain: its baseline, JiT.
# METHOD=window: its predecessor, which filters windows of 32 pixels.
#   DATA_PATH=/data/imagenet bash recipes/sf_700m_32.sh
source "$(dirname "$0")/common.sh" sf: plain:DISABLE_DCT_PATCHIFY=1 window:WINDOW_SIZE=32
default MODEL=JiT-700M GLOBAL_BATCH=1024 EPOCHS=200
launch "$@"
