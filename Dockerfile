# syntax=docker/dockerfile:1
ARG PYTHON_IMAGE=docker.io/library/python:3.11-slim-bookworm

# --- dependencies: changes only with the lock file -------------------------------------------------
FROM ${PYTHON_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1
COPY requirements.lock requirements-nodeps.lock requirements-runpod.lock /build/
# a private package index and its credentials come as a build secret, and stay in no layer
RUN --mount=type=cache,target=/root/.cache/pip \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf,required=false \
    python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install -r /build/requirements.lock -r /build/requirements-runpod.lock \
    && /opt/venv/bin/python -m pip install --no-deps -r /build/requirements-nodeps.lock \
    && find /opt/venv -name '__pycache__' -prune -exec rm -rf {} +

# --- the model that is baked in: none unless MODEL_ID or a URL is given ----------------------------
# A stage of its own, with no more of the code than brings models here (api/engine is what converts them): the model
# is fetched again when that, the dependencies or the arguments change, not when the server does. In the image its
# layer lies below the code, so that a change of the code makes one small layer to push and pull.
FROM dependencies AS model
ENV PATH=/opt/venv/bin:$PATH \
    HF_HUB_DISABLE_TELEMETRY=1 \
    HF_HUB_DISABLE_PROGRESS_BARS=1
WORKDIR /app
COPY models ./models
COPY api/*.py ./api/
COPY api/schema ./api/schema
COPY api/models ./api/models
COPY api/engine ./api/engine
COPY api/cli ./api/cli
ARG MODEL_ID=demo/shapes
ARG HF_MODEL_ID=
ARG MODEL_REVISION=
ARG MODEL_PRECISION=
ARG MODEL_URL=
ARG CHECKPOINT_URL=
ARG CHECKPOINT_CONFIG_URL=
ARG HF_ENDPOINT=
ARG AWS_S3_ENDPOINT_URL=
ARG AWS_S3_DEFAULT_BUCKET=
ARG AWS_DEFAULT_REGION=
# The secrets are files that are there for this command only. --no-upload: a build may be run often and anywhere, and
# only reads; `python -m api models push` is what fills a bucket. .locks and the like are of no use where nothing is written.
RUN --mount=type=secret,id=HF_AUTH_TOKEN \
    --mount=type=secret,id=AWS_ACCESS_KEY_ID \
    --mount=type=secret,id=AWS_SECRET_ACCESS_KEY \
    --mount=type=secret,id=AWS_SESSION_TOKEN \
    for name in HF_AUTH_TOKEN AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY AWS_SESSION_TOKEN; do \
        if [ -f "/run/secrets/$name" ]; then export "$name=$(cat "/run/secrets/$name")"; fi; \
    done \
    && mkdir -p /opt/diffusers-api/models \
    && python -m api download --no-upload --into /opt/diffusers-api/models \
    && rm -rf /opt/diffusers-api/models/.locks /opt/diffusers-api/models/.staging /opt/diffusers-api/models/.trash \
    && chmod -R a+rX /opt/diffusers-api

# --- the image ------------------------------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS server
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HOST=0.0.0.0 \
    PORT=8000 \
    HF_HUB_DISABLE_TELEMETRY=1 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --create-home --uid 1000 api \
    && install -d -o api -g api /home/api/.cache/diffusers-api/models /home/api/.local/state/diffusers-api
# COMPILER=1 for COMPILE=blocks: torch's inductor needs g++ on a CPU, Triton a C compiler on a GPU. 200 MB
ARG COMPILER=0
# unpinned: Debian keeps one g++ for each release, and forgets its older builds
# hadolint ignore=DL3008
RUN if [ "$COMPILER" = 1 ]; then apt-get update && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*; fi
WORKDIR /app
COPY --from=dependencies /opt/venv /opt/venv
# compiled once here, so that no start compiles it again
RUN python -m compileall -q /opt/venv/lib || true
# not below the home directory or /app: no volume is mounted over it
COPY --from=model /opt/diffusers-api /opt/diffusers-api
COPY models ./models
COPY api ./api
COPY LICENSE ./
# readable whatever the umask of the clone was
RUN chmod -R a+rX /app && python -m compileall -q api
# What was baked in is the default of the image, so that it is what a request without MODEL_ID gets.
# HF_ENDPOINT is not among them: it may be a mirror that only the machine that builds can reach.
ARG MODEL_ID=demo/shapes
ARG HF_MODEL_ID=
ARG MODEL_REVISION=
ARG MODEL_PRECISION=
ARG MODEL_URL=
ARG CHECKPOINT_URL=
ARG CHECKPOINT_CONFIG_URL=
ARG AWS_S3_ENDPOINT_URL=
ARG AWS_S3_DEFAULT_BUCKET=
ARG AWS_DEFAULT_REGION=
ARG RUNTIME_DOWNLOADS=1
ARG PIPELINE=AutoPipelineForText2Image
ARG SCHEDULER=DPMSolverMultistepScheduler
ENV MODEL_ID=${MODEL_ID} \
    HF_MODEL_ID=${HF_MODEL_ID} \
    MODEL_REVISION=${MODEL_REVISION} \
    MODEL_PRECISION=${MODEL_PRECISION} \
    MODEL_URL=${MODEL_URL} \
    CHECKPOINT_URL=${CHECKPOINT_URL} \
    CHECKPOINT_CONFIG_URL=${CHECKPOINT_CONFIG_URL} \
    AWS_S3_ENDPOINT_URL=${AWS_S3_ENDPOINT_URL} \
    AWS_S3_DEFAULT_BUCKET=${AWS_S3_DEFAULT_BUCKET} \
    AWS_DEFAULT_REGION=${AWS_DEFAULT_REGION} \
    RUNTIME_DOWNLOADS=${RUNTIME_DOWNLOADS} \
    PIPELINE=${PIPELINE} \
    SCHEDULER=${SCHEDULER}
# RUN_AS=0 where a platform mounts volumes that belong to root and lets nobody choose the user, as RunPod does
ARG RUN_AS=1000
USER ${RUN_AS}
EXPOSE 8000
STOPSIGNAL SIGTERM
# a serverless worker listens nowhere: the platform hears from it
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; os.environ.get('RUNPOD_WEBHOOK_GET_JOB') or urllib.request.urlopen('http://127.0.0.1:' + os.environ['PORT'] + '/health/live', timeout=2)"]
ENTRYPOINT ["python", "-m", "api"]
# a serverless worker where RunPod's platform hands out jobs, else the server
CMD ["start"]
