"""Every RPC and every field with invalid input: the answer is always a clear error."""

from typing import Any

import grpc
import pytest
from google.protobuf import descriptor as descriptors
from google.protobuf import field_mask_pb2
from latchkey_proto.v1 import token_service_pb2 as pb

from tests.helpers.rich_status import refusal

SERVICE = "/latchkey.v1.TokenService/"
MIB = 1024 * 1024

GOOD = {
    "Create": pb.CreateRequest(account_id="acme", name="ok", scope=pb.SCOPE_READ),
    "Get": pb.GetRequest(account_id="acme", id="tok_never"),
    "GetUsage": pb.GetUsageRequest(account_id="acme", id="tok_never"),
    "GetLimits": pb.GetLimitsRequest(account_id="acme"),
    "Find": pb.FindRequest(hint="3kF9"),
    "List": pb.ListRequest(account_id="acme"),
    "Delete": pb.DeleteRequest(account_id="acme", id="tok_never"),
    "Update": pb.UpdateRequest(
        account_id="acme",
        id="tok_never",
        token=pb.Token(name="ok"),
        update_mask=field_mask_pb2.FieldMask(paths=["name"]),
    ),
    "Disable": pb.DisableRequest(account_id="acme", id="tok_never"),
    "Enable": pb.EnableRequest(account_id="acme", id="tok_never"),
    "Rotate": pb.RotateRequest(account_id="acme", id="tok_never"),
    "RetireSecrets": pb.RetireSecretsRequest(account_id="acme", id="tok_never"),
    "DeleteAll": pb.DeleteAllRequest(account_id="acme"),
    "RevokeSecret": pb.RevokeSecretRequest(secrets=["lk_nonsense"]),
    "ReportSecret": pb.ReportSecretRequest(secrets=["lk_nonsense"]),
    "Import": pb.ImportRequest(tokens=[pb.ImportedToken(account_id="acme")]),
    "Verify": pb.VerifyRequest(secret="lk_nonsense", required_scope=pb.SCOPE_READ),
    "BatchVerify": pb.BatchVerifyRequest(requests=[pb.VerifyRequest(secret="lk_nonsense")]),
}
BAD_TEXT = {
    "empty": b"",
    "control character": b"a\x1bb",
    "NUL": b"a\x00b",
    "invalid UTF-8": b"a\xff\xfeb",
    "lone surrogate": b"a\xed\xa0\x80b",
    "too long": b"x" * 600,
    "much too long": b"x" * 6_000,
    "4 MiB": b"x" * (4 * MIB),
    "another script's digits": "١٢٣".encode(),
}
# Invalid UTF-8 makes the whole message undecodable, and one of 4 MiB is not decoded.
UNREADABLE = ("invalid UTF-8", "lone surrogate", "4 MiB")
TEXT_FIELDS = [
    (method, field.name)
    for method, message in GOOD.items()
    for field in message.DESCRIPTOR.fields
    if field.type == descriptors.FieldDescriptor.TYPE_STRING
]
# The value is valid here, or it is an ID or page token that does not exist.
ALLOWED = {
    ("List", "page_token", "empty"),
    ("Create", "name", "another script's digits"),
    ("Create", "description", "empty"),
    ("Create", "description", "another script's digits"),
    ("Create", "request_id", "empty"),
    ("Find", "id", "empty"),
    ("Find", "page_token", "empty"),
    *(
        (method, "secrets", kind)
        for method in ("RevokeSecret", "ReportSecret")
        for kind in BAD_TEXT
        if kind not in UNREADABLE
    ),
}
LISTS = ("allowed_networks", "permissions")
NOT_FOUND = {
    *((method, "id", "another script's digits") for method in GOOD if method != "Find"),
    ("Rotate", "request_id", "empty"),
}


def test_every_rpc_is_covered():
    """This suite covers every RPC, so the tests fail for a new RPC that is missing here. Watch
    is a stream and has its own tests in test_watch.py.
    """
    methods = {m.name for m in pb.DESCRIPTOR.services_by_name["TokenService"].methods}
    assert set(GOOD) | {"Watch"} == methods


def raw_call(channel, method):
    """Return the method without client-side (de)serialisation, so that any bytes can be sent."""
    return channel.unary_unary(SERVICE + method)


def encoded(message, field, value):
    """Encode `message` with `field` (of type string) set to arbitrary bytes."""
    copy = type(message)()
    copy.CopyFrom(message)
    copy.ClearField(field)
    number = message.DESCRIPTOR.fields_by_name[field].number
    return copy.SerializeToString() + bytes([number << 3 | 2]) + varint(len(value)) + value


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out + bytes([number]))


@pytest.mark.parametrize("kind", BAD_TEXT)
async def test_bad_text(channel, kind):
    """Invalid text in a field of any RPC yields an error that names the field; Verify returns a
    verdict."""
    assert TEXT_FIELDS
    for method, field in TEXT_FIELDS:
        call = raw_call(channel, method)(encoded(GOOD[method], field, BAD_TEXT[kind]), timeout=10)
        where = (method, field, kind)
        if method == "Verify":
            answer = pb.VerifyResponse.FromString(await call)
            assert answer.verdict == pb.VERDICT_MALFORMED, where
        elif where in ALLOWED:
            await call
            # Its name is free again for the next field.
            await raw_call(channel, "DeleteAll")(GOOD["DeleteAll"].SerializeToString())
        else:
            error = await refusal(call)
            if where in NOT_FOUND:
                assert error.code is grpc.StatusCode.NOT_FOUND, where
            else:
                assert error.code is grpc.StatusCode.INVALID_ARGUMENT, where
                named = [field] if field not in LISTS else [f"{field}[0]"]
                assert error.fields == ([""] if kind in UNREADABLE else named), where
            assert len(error.text) < 2_000, where


@pytest.mark.parametrize("scope", [3, 99, -1, 2**31 - 1])
async def test_unknown_scope(stub, create, scope):
    """A scope that the server does not know is refused by Create and never VALID in Verify."""
    error = await refusal(stub.Create(pb.CreateRequest(account_id="acme", name="n", scope=scope)))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["scope"])
    created = await create(scope=pb.SCOPE_WRITE)
    answer = await stub.Verify(pb.VerifyRequest(secret=created.secret, required_scope=scope))
    assert answer.verdict == pb.VERDICT_INSUFFICIENT_SCOPE


async def test_missing_fields(channel):
    """An empty message yields an error that names each required field."""
    required = {
        "Create": ["account_id", "name", "scope"],
        "Get": ["account_id", "id"],
        "GetUsage": ["account_id", "id"],
        "GetLimits": ["account_id"],
        "Find": ["hint"],
        "List": ["account_id"],
        "Delete": ["account_id", "id"],
        "Update": ["account_id", "id", "update_mask"],
        "Disable": ["account_id", "id"],
        "Enable": ["account_id", "id"],
        "Rotate": ["account_id", "id"],
        "RetireSecrets": ["account_id", "id"],
        "DeleteAll": ["account_id"],
        "RevokeSecret": ["secrets"],
        "ReportSecret": ["secrets"],
        "Import": ["tokens"],
        "BatchVerify": ["requests"],
    }
    for method, fields in required.items():
        error = await refusal(raw_call(channel, method)(b""))
        assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, fields)
    answer = pb.VerifyResponse.FromString(await raw_call(channel, "Verify")(b""))
    assert answer.verdict == pb.VERDICT_MALFORMED


@pytest.mark.parametrize("data", [b"\xff" * 20, b"\x0a\x7fshort", b"\x0b", b"\x00\x00"])
async def test_undecodable_message(channel, data):
    """Undecodable bytes are INVALID_ARGUMENT in every RPC, and the message says why."""
    for method in GOOD:
        error = await refusal(raw_call(channel, method)(data))
        assert (error.code, error.reason) == (
            grpc.StatusCode.INVALID_ARGUMENT,
            "REQUEST_NOT_PARSED",
        )


async def test_one_malformed_secret_does_not_fail_the_batch(channel, create):
    """In a batch, a secret that is not text is MALFORMED in its place and does not affect the
    others."""
    created = await create()
    good = pb.VerifyRequest(secret=created.secret, required_scope=pb.SCOPE_READ)
    bad = encoded(good, "secret", b"\xff\xfe")
    parts = [good.SerializeToString(), bad, good.SerializeToString()]
    data = b"".join(b"\x0a" + varint(len(part)) + part for part in parts)
    answer = pb.BatchVerifyResponse.FromString(await raw_call(channel, "BatchVerify")(data))
    assert [r.verdict for r in answer.responses] == [
        pb.VERDICT_VALID,
        pb.VERDICT_MALFORMED,
        pb.VERDICT_VALID,
    ]


@pytest.mark.parametrize(
    ("field", "seconds", "nanos"),
    [
        ("expire_time", 2**62, 0),
        ("expire_time", -(2**62), 0),
        ("expire_time", 253402300800, 0),
        ("expire_time", 4102444800, -1),
        ("expire_time", 4102444800, 10**9),
        ("expire_time", 0, 0),
        ("ttl", 2**62, 0),
        ("ttl", -(2**62), 0),
        ("ttl", -315576000000, 0),
        ("ttl", 315576000000, 0),
        ("ttl", 5, -1),
        ("ttl", 5, 10**9),
        ("ttl", 0, 0),
        ("ttl", -1, 0),
        ("ttl", 0, 999),
    ],
)
async def test_bad_expiry(stub, field, seconds, nanos):
    """A time or duration that is out of range, past, or of mixed signs is INVALID_ARGUMENT."""
    expiry: Any = {field: {"seconds": seconds, "nanos": nanos}}
    request = pb.CreateRequest(account_id="acme", name="n", scope=pb.SCOPE_READ, **expiry)
    error = await refusal(stub.Create(request))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, [field])


@pytest.mark.parametrize("page_size", [-1, -(2**31)])
async def test_negative_page_size(stub, page_size):
    """A negative page size is INVALID_ARGUMENT."""
    error = await refusal(stub.List(pb.ListRequest(account_id="acme", page_size=page_size)))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_size"])


@pytest.mark.parametrize("page_token", ["x", "AAAA", "=", "a" * 5000, "../../etc", "\u00e9"])
async def test_damaged_page_token(stub, page_token):
    """A page token that Latchkey did not issue is INVALID_ARGUMENT."""
    error = await refusal(stub.List(pb.ListRequest(account_id="acme", page_token=page_token)))
    assert (error.code, error.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["page_token"])


async def test_labels(stub):
    """Errors for too many labels, labels that are too long, and control characters name the label's
    key."""
    for labels, field in (
        ({str(n): "" for n in range(17)}, "labels"),
        ({"": "v"}, "labels"),
        ({"k" * 20_000: "v"}, "labels"),
        ({"🙂" * 60 + str(n): "x" * 256 for n in range(16)}, "labels"),
        ({"k": "v" * 20_000}, 'labels["k"]'),
        ({"k": "a\x00b"}, 'labels["k"]'),
    ):
        request = pb.CreateRequest(account_id="acme", name="n", scope=pb.SCOPE_READ, labels=labels)
        error = await refusal(stub.Create(request, timeout=10))
        assert error.code is grpc.StatusCode.INVALID_ARGUMENT
        assert set(error.fields) == {field}


async def test_streams_refuse_undecodable_messages(channel):
    """Garbage sent to health's Watch or to reflection is INVALID_ARGUMENT with details."""
    watch = channel.unary_stream("/grpc.health.v1.Health/Watch")
    reflect = channel.stream_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    )
    for call in (watch(b"\xff\xff"), reflect(iter([b"\xff\xff"]))):
        error = await refusal(call.read())
        assert error.reason == "REQUEST_NOT_PARSED"


async def test_health_of_an_unknown_service(channel):
    """Health of an unknown service is NOT_FOUND."""
    error = await refusal(channel.unary_unary("/grpc.health.v1.Health/Check")(b"\x0a\x01x"))
    assert (error.code, error.reason) == (grpc.StatusCode.NOT_FOUND, "SERVICE_NOT_FOUND")


async def test_unknown_method(channel):
    """An unknown method is UNIMPLEMENTED."""
    for path in (SERVICE + "Nope", SERVICE + "verify", "/nope.v1.Service/Verify"):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(path)(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("request_id", ["abc-123", "x" * 65, "a b", "a\u00e9", "", "<script>"])
async def test_request_id(channel, request_id):
    """The rejection repeats a valid request ID from the caller; the server replaces an invalid
    one."""
    metadata = (("x-request-id", request_id),) if request_id.isascii() else ()
    call = raw_call(channel, "Get")(b"", metadata=metadata)
    error = await refusal(call)
    assert (error.request_id == request_id) == (request_id == "abc-123")
