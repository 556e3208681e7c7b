# vLLM as a replica of a chain: vLLM's own image with weightline added. From the repository's root:
#   docker build -f infra/images/vllm.Dockerfile -t weightline-vllm .
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}

COPY pyproject.toml README.md LICENSE /src/
COPY weightline /src/weightline
COPY flows /src/flows
COPY tasks /src/tasks
COPY deployments /src/deployments
COPY infra/accelerate /src/infra/accelerate
# The tests run this version of vLLM. Older ones pin libraries below the versions that weightline needs.
RUN pip install --no-cache-dir '/src[vllm,sign]' && rm -rf /src

ENTRYPOINT ["weightline", "serve", "vllm"]
