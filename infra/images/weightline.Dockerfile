# One image for flows, ranks, evaluation, the dashboard and the embedded inference server. From the repository's root:
#   docker build -f infra/images/weightline.Dockerfile -t weightline .
# BASE: an image with CUDA for machines with GPUs, as in nvidia/cuda:12.8.1-runtime-ubuntu24.04 with Python added.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# util-linux has setpriv, which ends children when their parent is killed. DeepSpeed compiles its extensions at run time.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends build-essential util-linux \
    && rm -rf /var/lib/apt/lists/*

COPY pyproject.toml constraints.txt README.md LICENSE /src/
COPY weightline /src/weightline
COPY flows /src/flows
COPY tasks /src/tasks
COPY deployments /src/deployments
COPY infra/accelerate /src/infra/accelerate
RUN pip install --no-cache-dir -c /src/constraints.txt '/src[all]' 'asyncpg>=0.30' 'prefect-kubernetes>=0.8,<0.9' && rm -rf /src

WORKDIR /opt/weightline
COPY infra/kubernetes/prefect.yaml ./infra/kubernetes/prefect.yaml
RUN useradd --create-home --uid 10001 weightline && mkdir /runs && chown weightline /runs /opt/weightline
USER weightline
ENV PYTHONUNBUFFERED=1 PREFECT_SERVER_ANALYTICS_ENABLED=false DO_NOT_TRACK=1 \
    PREFECT_WORKER_QUERY_SECONDS=1 PREFECT_WORKER_PREFETCH_SECONDS=0
VOLUME /runs
CMD ["prefect", "worker", "start", "--type", "weightline", "--pool", "weightline"]
