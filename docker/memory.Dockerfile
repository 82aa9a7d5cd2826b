# The memory service.
# From the repository's root: docker build -f docker/memory.Dockerfile .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml LICENSE NOTICE constraints.txt requirements.lock docker/install.sh ./
# Extras of pyproject.toml: postgres is another. With certs it makes certificates, as compose.yaml has it do.
ARG EXTRAS=memory,certs,otel
ARG WHEELS=docker/wheels
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=docker/wheels,target=docker/wheels \
    sh install.sh /opt/mulligan ".[${EXTRAS}]"
COPY services/__init__.py services/__init__.pyi /app/mulligan/
COPY services/common /app/mulligan/common
COPY services/memory /app/mulligan/memory
RUN chmod -R a+rX /app && python -m compileall -q /app && rm /opt/mulligan/bin/mulligan

FROM ${BASE}
LABEL org.opencontainers.image.title="mulligan-memory" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.description="Reflections of language agents, kept over gRPC"
RUN --mount=type=bind,source=docker/harden.sh,target=/harden.sh \
    sh /harden.sh /data/memory /run/tokens /run/env-tokens /run/tls /run/engine-key /data/engine /data/models \
    /run/certs /run/certs/services /run/certs/services/env /run/certs/services/policy /run/certs/services/memory \
    /run/certs/services/trainer /run/certs/others /run/certs/others/jaeger
COPY --from=build /opt/mulligan /opt/mulligan
COPY --from=build /app /app
ENV PATH=/opt/mulligan/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/tmp MULLIGAN_MEMORY_DATABASE=sqlite:/data/memory/memory.db \
    MULLIGAN_MEMORY_HOST=0.0.0.0 MULLIGAN_MEMORY_PORT=50053
# The commit that the image was built from.
ARG REVISION=""
LABEL org.opencontainers.image.version="0.1.0" org.opencontainers.image.revision="$REVISION"
WORKDIR /app
USER 10001:10001
EXPOSE 50053
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --start-interval=2s --retries=3 \
    CMD ["python", "-m", "mulligan.common.healthcheck", "127.0.0.1:50053"]
ENTRYPOINT ["python", "-m", "mulligan.memory"]
