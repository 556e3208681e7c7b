# vLLM as a replica of a chain: vLLM's own image, with weightline beside it. From the repository's root:
#   docker build -f infra/images/vllm.Dockerfile -t weightline-vllm .
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}

WORKDIR /opt/weightline
COPY pyproject.toml README.md LICENSE ./
COPY weightline ./weightline
COPY flows ./flows
COPY tasks ./tasks
# This vLLM is the one that the tests run; an older one pins libraries below what weightline needs.
RUN pip install --no-cache-dir -e . 'cryptography>=44' 'httpx>=0.27' 'prometheus-client>=0.20'

ENTRYPOINT ["weightline", "serve", "vllm"]
