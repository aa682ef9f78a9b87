# The environment of requirements.lock and the code, for a GPU with NVIDIA's container toolkit, or without --gpus.
#
#   docker build --build-arg UID="$(id -u)" --tag jit .
#   docker run --rm --gpus all --shm-size 16g -v /data/imagenet:/data:ro -v "$PWD/output:/jit/output" \
#     -v "$PWD/fid_stats:/jit/fid_stats" -v "$HOME/weights:/weights:ro" -e WEIGHTS_DIR=/weights \
#     -e DATA_PATH=/data -e GLOBAL_BATCH=1024 -e OUTPUT_DIR=output/b16-sf jit
#
# The third line is for FID during training (fid_stats/README.md); without it add -e ONLINE_EVAL=0.
# --shm-size: the loader's processes pass images through /dev/shm, of which a container has 64 MB otherwise.
FROM python:3.12-slim-bookworm

# torch.compile needs a C compiler.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*

COPY requirements.lock /
RUN pip install --no-cache-dir --require-hashes -r /requirements.lock

# The output folder that is mounted is written by this user: build with your own number.
ARG UID=1000
RUN useradd --create-home --uid "$UID" jit && install -d -o "$UID" /jit/output /jit/data
WORKDIR /jit
COPY . .
USER $UID
CMD ["bash", "run_jit_multinode.sh"]
