# The trainer service, and the `mulligan` command.
# From the repository's root: docker build -f docker/trainer.Dockerfile .
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
    sh install.sh /opt/mulligan ".[trainer,cli,otel]"
COPY services /app/mulligan
COPY models /app/mulligan/models
COPY recipes /app/mulligan/recipes
RUN chmod -R a+rX /app && python -m compileall -q /app

FROM ${BASE}
# First, so that the layer has the same parents in both images and is stored once.
COPY --from=torch /opt/torch /opt/torch
LABEL org.opencontainers.image.title="mulligan-trainer" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.description="Language agents that learn by experience: the trainer and the command line"
RUN --mount=type=bind,source=docker/harden.sh,target=/harden.sh \
    sh /harden.sh /data/runs /data/checkpoints /data/weights /data/models /run/tokens /run/env-tokens /run/tls
COPY --from=build /opt/mulligan /opt/mulligan
COPY --from=build /app /app
ENV PATH=/opt/mulligan/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/tmp HF_HOME=/data/models/hub OMP_WAIT_POLICY=PASSIVE \
    MULLIGAN_TRAINER_RUNS_FOLDER=/data/runs MULLIGAN_TRAINER_CHECKPOINT_FOLDER=/data/checkpoints \
    MULLIGAN_TRAINER_WEIGHTS_FOLDER=/data/weights MULLIGAN_TRAINER_MODELS_FOLDER=/data/models \
    MULLIGAN_TRAINER_HOST=0.0.0.0 MULLIGAN_TRAINER_PORT=50054
# The commit that the image was built from.
ARG REVISION=""
LABEL org.opencontainers.image.version="0.1.0" org.opencontainers.image.revision="$REVISION"
WORKDIR /app
USER 10001:10001
EXPOSE 50054
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --start-interval=2s --retries=3 \
    CMD ["python", "-m", "mulligan.common.healthcheck", "127.0.0.1:50054"]
ENTRYPOINT ["python", "-m", "mulligan.trainer"]
