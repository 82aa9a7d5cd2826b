# The policy service.
# From the repository's root: docker build -f docker/policy.Dockerfile .
ARG BASE=python:3.11-slim

# The same in policy.Dockerfile and trainer.Dockerfile, so that it is built and stored once.
FROM ${BASE} AS torch
WORKDIR /src
COPY constraints.txt requirements.lock docker/install.sh ./
# The index that torch is taken from, as that of PyTorch's builds for the CPU; "" for pip's own, with CUDA on x86.
ARG TORCH_INDEX=""
# A folder of wheels that are preferred to every index, of torch, too; "" for none.
ARG WHEELS=docker/wheels
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=docker/wheels,target=docker/wheels \
    sh install.sh /opt/torch torch transformers tokenizers safetensors numpy

FROM torch AS build
ARG WHEELS=docker/wheels
COPY pyproject.toml LICENSE NOTICE ./
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=docker/wheels,target=docker/wheels \
    sh install.sh /opt/mulligan ".[policy,openai,sglang,vllm,otel]"
COPY services/__init__.py services/__init__.pyi /app/mulligan/
COPY services/common /app/mulligan/common
COPY services/policy /app/mulligan/policy
COPY models /app/mulligan/models
RUN chmod -R a+rX /app && python -m compileall -q /app && rm /opt/mulligan/bin/mulligan

FROM ${BASE}
# First, so that the layer has the same parents in both images and is stored once.
COPY --from=torch /opt/torch /opt/torch
LABEL org.opencontainers.image.title="mulligan-policy" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.description="Language models with versioned weights, served over gRPC"
RUN --mount=type=bind,source=docker/harden.sh,target=/harden.sh \
    sh /harden.sh /data/weights /data/policy /data/engine /data/models /run/tokens /run/tls /run/engine-key
COPY --from=build /opt/mulligan /opt/mulligan
COPY --from=build /app /app
ENV PATH=/opt/mulligan/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/tmp HF_HOME=/data/models/hub OMP_WAIT_POLICY=PASSIVE \
    MULLIGAN_POLICY_WEIGHTS_FOLDER=/data/weights MULLIGAN_POLICY_STATE_FOLDER=/data/policy \
    MULLIGAN_POLICY_MODELS_FOLDER=/data/models \
    MULLIGAN_POLICY_HOST=0.0.0.0 MULLIGAN_POLICY_PORT=50052
# The commit that the image was built from.
ARG REVISION=""
LABEL org.opencontainers.image.version="0.1.0" org.opencontainers.image.revision="$REVISION"
WORKDIR /app
USER 10001:10001
EXPOSE 50052
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --start-interval=2s --retries=3 \
    CMD ["python", "-m", "mulligan.common.healthcheck", "127.0.0.1:50052"]
ENTRYPOINT ["python", "-m", "mulligan.policy"]
