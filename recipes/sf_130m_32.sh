#!/usr/bin/env bash
# Spectral Forcing, 130M/32 on ImageNet 256 x 256 (arXiv 2606.15236), 200 epochs or EPOCHS=600. METHOD=plain: its baseline, JiT.
#   DATA_PATH=/data/imagenet bash recipes/sf_130m_32.sh
source "$(dirname "$0")/common.sh" sf: plain:DISABLE_DCT_PATCHIFY=1
default MODEL=JiT-B/32 GLOBAL_BATCH=1024 EPOCHS=200
launch "$@"
