#!/usr/bin/env bash
# JiT-B/16 on ImageNet 256 x 256, as in its paper (arXiv 2511.13720): 600 epochs, or EPOCHS=200; guidance 2.9 within (0.1, 1).
#   DATA_PATH=/data/imagenet bash recipes/jit_b16.sh
source "$(dirname "$0")/common.sh" plain:DISABLE_DCT_PATCHIFY=1
default MODEL=JiT-B/16 GLOBAL_BATCH=1024 EPOCHS=600
launch "$@"
