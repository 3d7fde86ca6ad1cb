# TrOCR on TensorRT, ready to run: `make run` and `make test` work in the container.
#
#   docker build --build-arg TENSORRT_IMAGE=<NVIDIA's container registry>/nvidia/tensorrt:25.10-py3 -t trocr-tensorrt .
#   docker run --rm --gpus all trocr-tensorrt                  # make run
#   docker run --rm --gpus all trocr-tensorrt make test
#
# TENSORRT_IMAGE is NVIDIA's TensorRT image by its full name (its catalogue page shows it); the default resolves where a
# registry mirror is configured.
ARG TENSORRT_IMAGE=nvidia/tensorrt:25.10-py3
FROM ${TENSORRT_IMAGE}

RUN apt-get update \
    && apt-get install -y --no-install-recommends libgtest-dev make python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /workspace/trocr
# The packages and the toolchain change seldom: a layer of their own.
COPY Makefile requirements.txt requirements-cuda.txt requirements-tensorrt.txt ./
COPY scripts scripts
RUN make setup

COPY . .
CMD ["make", "run"]
