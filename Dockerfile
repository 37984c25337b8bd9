FROM python:3.11-slim-bookworm AS build
WORKDIR /src
RUN python3 -m venv /venv
COPY constraints/serve.txt constraints/serve.txt
RUN /venv/bin/pip install --no-cache-dir --require-hashes -r constraints/serve.txt
COPY pyproject.toml README.md LICENSE sluicegate.py ./
COPY models models
COPY service service
COPY training training
RUN /venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation .

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --user-group --no-create-home --shell /usr/sbin/nologin sluicegate \
    && install --directory --owner=10001 --group=10001 --mode=0750 /data
COPY --from=build /venv /venv
# A container is reached from outside itself, so it listens on every address. The service asks
# for API keys there, unless whoever runs it sets SLUICEGATE_ALLOW_UNAUTHENTICATED=true.
# ONNX Runtime reports its use to its maker unless it is told not to.
ENV PATH=/venv/bin:$PATH \
    ORT_DISABLE_TELEMETRY=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    SLUICEGATE_HOST=0.0.0.0 \
    SLUICEGATE_PORT=8080 \
    SLUICEGATE_ADMIN_HOST=0.0.0.0 \
    SLUICEGATE_ADMIN_PORT=8081 \
    SLUICEGATE_DATA_DIRECTORY=/data
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8080 8081
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 CMD ["python3", "-c", \
    "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ['SLUICEGATE_PORT'] + '/health/live', timeout=2)"]
ENTRYPOINT ["sluicegate"]
CMD ["serve"]
