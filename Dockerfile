# syntax=docker/dockerfile:1
# `viaticum serve` on CPUs: docs/how-to/container.md.

FROM python:3.11-slim AS build
# server,remote leaves torch out, for models behind APIs alone.
ARG EXTRAS=server,remote,local
# torch's wheels for CPUs, which PyPI lacks: its own bring CUDA along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
WORKDIR /src
COPY . .
RUN python -m venv /opt/viaticum \
 && /opt/viaticum/bin/pip install --no-cache-dir --no-compile --extra-index-url "$TORCH_INDEX" \
    -c constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim
LABEL org.opencontainers.image.title="Viaticum" \
      org.opencontainers.image.description="An OpenAI-compatible server that routes and never spends more than a budget" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /opt/viaticum /opt/viaticum
# Volumes get the owner that these folders have.
RUN useradd --uid 10001 --user-group --home-dir /var/lib/viaticum --shell /usr/sbin/nologin viaticum \
 && install -d -o viaticum -g viaticum -m 0700 /var/lib/viaticum /var/cache/viaticum
ENV PATH=/opt/viaticum/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/viaticum \
    VIATICUM_HOME=/var/lib/viaticum \
    VIATICUM_CACHE=/var/cache/viaticum
# A number, so that Kubernetes can see that it is not root.
USER 10001:10001
WORKDIR /var/lib/viaticum
VOLUME ["/var/lib/viaticum", "/var/cache/viaticum"]
EXPOSE 8000
# The slim image has no curl. Status 503 (draining) and no answer raise, which is exit code 1.
HEALTHCHECK --interval=30s --timeout=5s --start-period=60s --retries=3 \
  CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["viaticum"]
CMD ["serve", "--host", "0.0.0.0"]
