# The environment service.
# From the repository's root: docker build -f docker/env.Dockerfile .
ARG BASE=python:3.11-slim

FROM ${BASE} AS build
WORKDIR /src
COPY pyproject.toml LICENSE NOTICE constraints.txt requirements.lock docker/install.sh ./
# Extras of pyproject.toml: gymnasium, reasoning-gym and textarena are others.
ARG EXTRAS=env,hotpotqa,openenv,otel
ARG WHEELS=docker/wheels
# Where torch is looked for; see policy.Dockerfile. Only the extra hotpotqa-dense needs it.
ARG TORCH_INDEX=""
RUN --mount=type=cache,target=/root/.cache/pip --mount=type=bind,source=docker/wheels,target=docker/wheels \
    case ",${EXTRAS}," in *,hotpotqa-dense,*|*,all,*) torch=torch ;; esac; \
    sh install.sh /opt/mulligan ${torch:-} ".[${EXTRAS}]"
COPY services/__init__.py services/__init__.pyi /app/mulligan/
COPY services/common /app/mulligan/common
COPY services/env /app/mulligan/env
RUN chmod -R a+rX /app && python -m compileall -q /app && rm /opt/mulligan/bin/mulligan

FROM ${BASE}
LABEL org.opencontainers.image.title="mulligan-env" \
    org.opencontainers.image.licenses="Apache-2.0" \
    org.opencontainers.image.description="Environments for language agents, served over gRPC"
RUN --mount=type=bind,source=docker/harden.sh,target=/harden.sh \
    sh /harden.sh /run/env-tokens /run/tls
COPY --from=build /opt/mulligan /opt/mulligan
COPY --from=build /app /app
ENV PATH=/opt/mulligan/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 \
    HOME=/tmp \
    MULLIGAN_ENV_HOST=0.0.0.0 MULLIGAN_ENV_PORT=50051
# The commit that the image was built from.
ARG REVISION=""
LABEL org.opencontainers.image.version="0.1.0" org.opencontainers.image.revision="$REVISION"
WORKDIR /app
USER 10001:10001
EXPOSE 50051
HEALTHCHECK --interval=30s --timeout=10s --start-period=120s --start-interval=2s --retries=3 \
    CMD ["python", "-m", "mulligan.common.healthcheck", "127.0.0.1:50051"]
ENTRYPOINT ["python", "-m", "mulligan.env"]
