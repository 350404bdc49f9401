# plrd_train with everything that requirements.lock names. docs/launch.md says how to build it, run it and what to mount.
#
# BASE: torch's wheels bring CUDA, cuDNN and NCCL, so NVIDIA's smallest image is enough, and any Debian or Ubuntu whose Python is 3.11 or newer will do.
# FLASH_ATTN: an image of the same distribution with nvcc, in which flash-attn is compiled; where it is empty, the image comes without flash-attn.
ARG BASE=docker.io/nvidia/cuda:13.0.2-base-ubuntu24.04
ARG FLASH_ATTN=

# The compiler stays in the image: `engine.compile=true` needs it, with Python's headers, at run time, for Triton's launchers and for C++ on CPUs. So does
# DeepSpeed's NVMe offload, with libaio's. procps is for launch/deepspeed.sh.
FROM ${BASE} AS system
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        ca-certificates g++ libaio-dev procps python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

# From the source package, for the lock's torch: hours on few cores. Each of MAX_JOBS takes up to 9 GB; ARCHS are compute capabilities, such as "80;90".
FROM ${FLASH_ATTN:-system} AS flash
ARG FLASH_ATTN
ARG FLASH_ATTN_VERSION=2.8.3.post2
ARG FLASH_ATTN_CUDA_ARCHS
ARG MAX_JOBS
COPY requirements.lock /build/
RUN mkdir /wheels; test -z "$FLASH_ATTN" || { apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends ca-certificates g++ python3-dev python3-venv \
    && python3 -m venv /build/venv \
    && . /build/venv/bin/activate \
    && pip install --no-cache-dir $(grep -E '^(torch|ninja|numpy|packaging|psutil)==' /build/requirements.lock) setuptools wheel \
    && FLASH_ATTENTION_FORCE_BUILD=TRUE pip wheel --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels flash-attn==$FLASH_ATTN_VERSION; }

# What changes most comes last: a change of the source installs nothing else anew. torch comes first and pinned, as in the Makefile.
FROM system
ENV PATH=/opt/plrd/launch:/opt/plrd/.venv/bin:$PATH
COPY requirements.lock /opt/plrd/
RUN python3 -m venv /opt/plrd/.venv \
    && pip install --no-cache-dir --upgrade pip \
    && pip install --no-cache-dir $(grep '^torch==' /opt/plrd/requirements.lock) \
    && pip install --no-cache-dir --requirement /opt/plrd/requirements.lock
# HOME is everybody's, so that the image also runs as the user who starts it (`--user "$(id -u):$(id -g)"`), whom its passwd does not know.
ENV HOME=/plrd
RUN useradd --uid 10001 --home-dir /plrd plrd && mkdir -p /plrd/runs /plrd/.cache/huggingface && chmod -R 1777 /plrd
RUN --mount=type=bind,from=flash,source=/wheels,target=/wheels find /wheels -name '*.whl' -exec pip install --no-cache-dir --no-deps {} +
RUN --mount=type=bind,target=/src pip install --no-cache-dir --no-deps /src
COPY --chmod=755 launch/*.sh /opt/plrd/launch/
WORKDIR /plrd
USER plrd
ENTRYPOINT ["plrd"]
