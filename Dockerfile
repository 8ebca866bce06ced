# Two targets:
#   docker build --target cpu  -t rft:cpu .     # a machine without a GPU
#   docker build --target cuda -t rft:cuda .    # NVIDIA GPUs; run with `--gpus all`
#
# No Docker was available where this file was written, so NEITHER IMAGE WAS BUILT HERE. Checked instead, on Debian 12 with
# Python 3.11: that the files which .dockerignore lets through make an installable package, and scripts/setup_env.py for
# the CPU, which every CI run uses. Of the target cuda nothing was checked: it was never built and never run.
#
# The reward `code` needs namespaces for its strongest sandbox: run with `--security-opt seccomp=unconfined`, or with a
# profile that allows unshare and clone. Otherwise rft uses Landlock, or refuses to start and names what is missing.
# Ray and vLLM use shared memory: run with `--shm-size=8g` or more.

FROM python:3.11-slim-bookworm AS base
RUN apt-get update \
    && apt-get install -y --no-install-recommends bubblewrap build-essential git libnuma1 libseccomp2 make \
    && rm -rf /var/lib/apt/lists/*
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 UV_NO_CACHE=1 RAY_USAGE_STATS_ENABLED=0 PATH=/rft/.venv/bin:$PATH
WORKDIR /rft
COPY . .

FROM base AS cpu
RUN python scripts/setup_env.py .venv --extras quant --device cpu
ENTRYPOINT ["rft"]
CMD ["--help"]

# CUDA's libraries come with the packages of torch and vLLM; the driver comes from the host. Not scripts/setup_env.py: it
# ends with a check that a GPU is visible, and there is none while an image is built.
FROM base AS cuda
RUN python -m venv .venv && .venv/bin/pip install -e '.[cuda,quant]' && .venv/bin/python -c "import torch, rft"
ENTRYPOINT ["rft"]
CMD ["--help"]
