# docker build --tag anew .
# docker build --tag anew --build-arg BASE=nvidia/cuda:13.0.2-base-ubuntu24.04 .
# docker run --rm -it --volume "$PWD:/work" anew train shakespeare        (GPUs: --gpus all)
#
# PyPI's torch brings CUDA, so both bases run on GPUs. For an image without CUDA, --build-arg
# PIP_EXTRA_INDEX_URL=... names an index that has torch's CPU build.
ARG BASE=debian:bookworm-slim
FROM ${BASE}
ARG PIP_EXTRA_INDEX_URL

# g++ and Python's headers are for torch.compile and the CPU decoder.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/anew
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY tools/set_up.py tools/
COPY src src
RUN python3 tools/set_up.py --without-dev

WORKDIR /work
ENTRYPOINT ["/opt/anew/.venv/bin/anew"]
CMD ["--help"]
