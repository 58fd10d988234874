# syntax=docker/dockerfile:1
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# --- dependencies: changes only with the lock file -------------------------------------------------
FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock /build/requirements.lock
# a private package index and its credentials come as a build secret, and stay in no layer
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install -r /build/requirements.lock \
    && find /opt/venv -name '__pycache__' -prune -exec rm -rf {} +

# --- the image ------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS server
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 api \
    && install -d -o api -g api /home/api/.cache/diffusers-api/models
WORKDIR /app
COPY --from=dependencies /opt/venv /opt/venv
COPY models ./models
COPY api ./api
COPY LICENSE ./
# compiled once here, so that no start compiles it again; readable whatever the umask of the clone was
RUN chmod -R a+rX /app && (python -m compileall -q /opt/venv/lib api || true)
USER 1000
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health/live', timeout=2)"]
ENTRYPOINT ["python", "-m", "api"]
CMD ["serve"]
