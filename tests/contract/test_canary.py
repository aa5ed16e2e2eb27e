"""A secret appears once, in the answer to Create, and never in logs, errors or the database."""

from typing import Any

import asyncpg
import grpc
import pytest
from google.protobuf import field_mask_pb2
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_service.process import trace_export
from latchkey_service.tokens.verifier import Verifier
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.helpers.captured_log import everything_logged
from tests.helpers.spans import TRACE, trace_of, traceparent
from tests.helpers.waiting import eventually

SERVICE = "/latchkey.v1.TokenService/"


@pytest.fixture(params=["json", "console"])
def logs(request):
    """Everything that the process logs at debug level, in both formats."""
    with everything_logged(request.param, "debug") as written:
        yield written


@pytest.fixture
def exported(monkeypatch):
    """The spans that the server exports."""
    memory = InMemorySpanExporter()
    monkeypatch.setattr(trace_export, "OTLPSpanExporter", lambda **_: memory)
    return memory


@pytest.fixture
def settings(settings, exported):
    """Settings under which every successful verify gets a log line, and every call a trace."""
    traced = {"traces": "on", "traces_verify_share": 1.0, "traces_per_second": 10_000.0}
    return settings.model_copy(update={"log_verify_share": 1.0} | traced)


@pytest.fixture
def address(own_address):
    """The address of a server with those settings."""
    return own_address


async def dump(database_url):
    """Return every row of every table, as text."""
    connection = await asyncpg.connect(database_url)
    try:
        tables = await connection.fetch(
            "SELECT format('%I', tablename) AS name FROM pg_tables WHERE schemaname = 'public'"
        )
        rows = [await connection.fetch(f"SELECT t::text FROM {t['name']} t") for t in tables]  # noqa: S608
    finally:
        await connection.close()
    assert len(tables) > 5
    return str(rows)


async def test_the_secret_never_leaks(logs, channel, create, database_url, monkeypatch, exported):
    """Every RPC, in success and in failure, with the secret in every text field, leaks it
    nowhere."""
    created = await create(name="canary")
    secret = created.secret
    told = []

    async def attempt(method, request, **options):
        call = channel.unary_unary(SERVICE + method)
        try:
            answer = await call(request, timeout=5, **options)
            told.append(str(answer))
        except grpc.aio.AioRpcError as error:
            told.append(f"{error!r} {error.details()} {error.debug_error_string()}")
            told.append(str(list(error.trailing_metadata() or ())))

    def messages(value):
        yield "Get", pb.GetRequest(account_id=value, id=value)
        yield "Get", pb.GetRequest(account_id="acme", id=value)
        yield "Get", pb.GetRequest(account_id="acme", id=created.token.id)
        yield "GetUsage", pb.GetUsageRequest(account_id=value, id=value)
        yield "GetUsage", pb.GetUsageRequest(account_id="acme", id=created.token.id)
        yield "GetLimits", pb.GetLimitsRequest(account_id=value)
        yield "Find", pb.FindRequest(id=value)
        yield "Find", pb.FindRequest(hint=value)
        yield "Find", pb.FindRequest(hint=value[:16], page_token=value)
        yield "Find", pb.FindRequest(id=created.token.id)
        row = pb.ImportedToken(account_id="acme", name="row", scope=pb.SCOPE_READ, hint=value[:16])
        for field in ("account_id", "name", "description", "hint"):
            wrong = pb.ImportedToken()
            wrong.CopyFrom(row)
            setattr(wrong, field, value)
            yield "Import", pb.ImportRequest(tokens=[wrong])
        yield "List", pb.ListRequest(account_id=value)
        yield "List", pb.ListRequest(account_id="acme", page_token=value)
        yield "List", pb.ListRequest(account_id="acme")
        yield "Create", pb.CreateRequest(account_id=value, name=value)
        yield "Create", pb.CreateRequest(account_id="acme", name=value * 2, scope=pb.SCOPE_READ)
        yield "Create", pb.CreateRequest(account_id="acme", name="canary", scope=pb.SCOPE_READ)
        yield "Create", pb.CreateRequest(account_id="acme", name=value, scope=pb.SCOPE_READ)
        for labels in ({value: "v" * 256}, {value: "v"}, {"k": value}, {"k": value * 5}):
            yield (
                "Create",
                pb.CreateRequest(account_id="acme", name="n", scope=pb.SCOPE_READ, labels=labels),
            )
        for scope in pb.Scope.values():
            question = pb.VerifyRequest(secret=value, required_scope=scope)
            yield "Verify", question
            yield "BatchVerify", pb.BatchVerifyRequest(requests=[question])
        yield "Verify", pb.VerifyRequest(secret=value + "x")
        yield "Verify", pb.VerifyRequest(secret=value[:-1] + ("0" if value[-1] != "0" else "1"))
        yield "Delete", pb.DeleteRequest(account_id=value, id=value)
        yield "Delete", pb.DeleteRequest(account_id="acme", id=value)
        fields: dict[str, Any] = {"account_id": "acme", "name": "n", "scope": pb.SCOPE_READ}
        for more in (
            {"description": value},
            {"allowed_networks": [value]},
            {"permissions": [value]},
            {"request_id": value},
        ):
            yield "Create", pb.CreateRequest(**fields, **more)
        for paths, token in (
            ([value], {}),
            (["name"], {"name": value}),
            (["description"], {"description": value}),
            (["labels"], {"labels": {value: value}}),
            (["allowed_networks"], {"allowed_networks": [value]}),
            (["permissions"], {"permissions": [value]}),
        ):
            mask = field_mask_pb2.FieldMask(paths=paths)
            for token_id in (value, created.token.id):
                yield (
                    "Update",
                    pb.UpdateRequest(
                        account_id="acme",
                        id=token_id,
                        token=pb.Token(**token),
                        update_mask=mask,
                    ),
                )
        for name in ("Disable", "Enable", "Rotate", "RetireSecrets"):
            request_type = getattr(pb, name + "Request")
            yield name, request_type(account_id=value, id=value)
            yield name, request_type(account_id="acme", id=value)
        selected = pb.TokenFilter(name_contains=value, label={value: value})
        yield "DeleteAll", pb.DeleteAllRequest(account_id=value)
        yield "DeleteAll", pb.DeleteAllRequest(account_id="acme", filter=selected)
        required = pb.VerifyRequest(
            secret=value, client_address=value, required_permissions=[value]
        )
        yield "Verify", required
        yield "RevokeSecret", pb.RevokeSecretRequest(secrets=[value, value + "x"])
        yield "ReportSecret", pb.ReportSecretRequest(secrets=[value, value + "x"])

    for method, message in messages(secret):
        await attempt(method, message.SerializeToString(), metadata=(("x-request-id", secret),))
    for method in (
        *("Create", "Get", "GetUsage", "List", "Delete", "DeleteAll", "Verify", "BatchVerify"),
        *("GetLimits", "Find", "Import", "Update", "Disable", "Enable", "Rotate", "RetireSecrets"),
        *("RevokeSecret", "ReportSecret"),
    ):
        await attempt(method, b"\xff" + secret.encode())
        await attempt(method, b"\x0a\x3f\xff" + secret.encode())

    # An unexpected failure whose message quotes the secret, and one whose cause quotes it.
    def fail(self, presented, *question):
        try:
            raise KeyError(secret)
        except KeyError as cause:
            raise RuntimeError(f"unexpected {secret} {presented!r}") from cause

    monkeypatch.setattr(Verifier, "verify_cached", fail)
    question = pb.VerifyRequest(secret=secret)
    await attempt("Verify", question.SerializeToString())
    await attempt("BatchVerify", pb.BatchVerifyRequest(requests=[question]).SerializeToString())
    assert "INTERNAL" in told[-1] or "INTERNAL" in told[-2]
    monkeypatch.undo()
    await attempt(
        "Delete", pb.DeleteRequest(account_id="acme", id=created.token.id).SerializeToString()
    )
    await attempt("Verify", question.SerializeToString())

    # Spans are exported in order.
    await attempt("Verify", question.SerializeToString(), metadata=traceparent())
    await eventually(
        lambda: any(trace_of(span) == TRACE for span in exported.get_finished_spans()), "all spans"
    )
    spans = [span.to_json() for span in exported.get_finished_spans()]
    assert len(spans) > 100

    lines = logs.getvalue()
    assert "RuntimeError" in lines, "the unforeseen failure is logged"
    assert lines.count("TokenService/Verify") > 5
    everywhere = {
        "logs": lines,
        "answers": str(told),
        "database": await dump(database_url),
        "traces": str(spans),
    }
    pieces = {"secret": secret, "body": secret[3:46], "end": secret[46:], "start": secret[:20]}
    leaks = [
        (place, piece)
        for place, text in everywhere.items()
        for piece, value in pieces.items()
        if value in text
    ]
    assert leaks == []
