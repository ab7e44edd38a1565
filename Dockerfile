# Two images from one file:
#
#   docker build --target envs    -t agentrl-envs .      environment server, without torch
#   docker build --target trainer -t agentrl-trainer .   trainer, evaluation and TensorBoard, with torch
#
# BASE_IMAGE: any Debian-like image with Python 3.11 or newer. BUILD_IMAGE: where packages are installed before they are
# copied into it (it may hold a folder of wheels that the result should not). TORCH_INDEX_URL: the package index that
# torch comes from; without it, pip's own (on Linux that is the CUDA build, several gigabytes).
ARG BASE_IMAGE=python:3.11-slim
ARG BUILD_IMAGE=${BASE_IMAGE}
ARG VLLM_IMAGE=vllm/vllm-openai:v0.32.0

FROM ${BUILD_IMAGE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH
WORKDIR /src
COPY docker/pins.txt docker/envs.txt docker/trainer.txt docker/

FROM build AS wheel
RUN pip install -q -c docker/pins.txt hatchling
COPY pyproject.toml README.md LICENSE ./
COPY agentrl agentrl
COPY environments environments
COPY policies policies
RUN pip wheel -q --no-deps --no-build-isolation -w /dist .

FROM build AS envs-venv
RUN pip install -q -c docker/pins.txt -r docker/envs.txt
COPY --from=wheel /dist /dist
RUN pip install -q --no-deps /dist/*.whl && pip uninstall -q -y pip

FROM build AS trainer-venv
ARG TORCH_INDEX_URL=
RUN pip install -q -c docker/pins.txt ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} torch
RUN pip install -q -c docker/pins.txt -r docker/envs.txt -r docker/trainer.txt
COPY --from=wheel /dist /dist
RUN pip install -q --no-deps /dist/*.whl && pip uninstall -q -y pip

FROM ${BASE_IMAGE} AS runtime
RUN useradd --uid 10001 --create-home --shell /usr/sbin/nologin agentrl \
    && mkdir /runs /secrets /exchange \
    && chown 10001:10001 /runs /secrets /exchange
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HOME=/tmp
WORKDIR /app
USER 10001:10001

FROM runtime AS envs
COPY --from=envs-venv /opt/venv /opt/venv
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --retries=12 CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["agentrl"]
CMD ["serve", "Sokoban-v0", "--host", "0.0.0.0", "--port", "8000"]

FROM runtime AS trainer
COPY --from=trainer-venv /opt/venv /opt/venv
COPY configs configs
COPY benchmarks benchmarks
ENV MPLCONFIGDIR=/tmp/matplotlib HF_HOME=/tmp/huggingface
ENTRYPOINT ["agentrl"]
CMD ["--help"]

# A vLLM server that takes our weights (docker-compose.gpu.yml); last, so that nothing else pulls its base.
FROM ${VLLM_IMAGE} AS vllm
COPY --from=wheel /dist /dist
# A new volume takes the owner of the folder that it is first mounted on: the trainer writes weights there.
RUN pip install --no-deps /dist/*.whl && mkdir /exchange && chown 10001:10001 /exchange
