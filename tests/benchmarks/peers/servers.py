"""The products: how each is installed and started, and how a credential is checked and deleted.

Each one has a database in the same Postgres, one core, and no TLS. A check asks the product what a
service would ask it for every request that presents a credential.
"""

import base64
import contextlib
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc
from latchkey_proto.v1 import token_service_pb2 as pb
from latchkey_proto.v1 import token_service_pb2_grpc as pb_grpc

from tests.benchmarks import processes
from tests.benchmarks.peers.programs import Unavailable, program
from tests.benchmarks.peers.starting import (
    Api,
    chunks,
    digest,
    http_form,
    message,
    migrated,
    served,
    text,
)
from tests.helpers.free_ports import free_port

__all__ = ["CREDENTIALS", "PRODUCTS", "GrpcCheck", "HttpCheck", "Product", "Running", "Unavailable"]

# How many credentials each product has: so few that the slowest product with a cache has seen all
# of them before a slice is measured.
CREDENTIALS = 300
CALL_SECONDS_MAX = 20.0
ACCOUNT = "bench"


@dataclass(frozen=True, slots=True)
class GrpcCheck:
    """A check over gRPC: one serialised request per credential. `allows` reads an answer."""

    address: str
    path: str
    requests: Sequence[bytes]
    begins_with: bytes
    allows: Callable[[bytes], bool]
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class HttpCheck:
    """A check over HTTP: one whole request per credential. `allows` reads the answer's body."""

    address: str
    requests: Sequence[bytes]
    allows: Callable[[bytes], bool]


@dataclass(frozen=True, slots=True)
class Running:
    """A product that serves, with CREDENTIALS credentials. `delete` takes a credential's number and
    returns when the product has confirmed the deletion."""

    name: str
    version: str
    pid: int
    check: GrpcCheck | HttpCheck
    delete: Callable[[int], None]


# Starts one product and yields each of its variants.
Product = Callable[[Path, str, int], "contextlib.AbstractContextManager[list[Running]]"]


# ---- Latchkey ----


@contextlib.contextmanager
def latchkey(scratch: Path, database_url: str, core: int) -> Iterator[list[Running]]:
    """Run one worker with the default settings."""
    settings = {"DATABASE_URL": database_url, "DATA_DIR": str(scratch / "latchkey-data")}
    with (
        processes.latchkey(scratch, "latchkey", settings, {core}) as server,
        grpc.insecure_channel(server.address) as channel,
    ):
        stub = pb_grpc.TokenServiceStub(channel)
        created = [
            stub.Create(
                pb.CreateRequest(account_id=ACCOUNT, name=f"token {n}", scope=pb.SCOPE_READ),
                timeout=CALL_SECONDS_MAX,
            )
            for n in range(CREDENTIALS)
        ]
        requests = [
            pb.VerifyRequest(secret=one.secret, required_scope=pb.SCOPE_READ).SerializeToString()
            for one in created
        ]

        def delete(number: int) -> None:
            request = pb.DeleteRequest(account_id=ACCOUNT, id=created[number].token.id)
            stub.Delete(request, timeout=CALL_SECONDS_MAX)

        valid = b"\x08\x01"
        check = GrpcCheck(
            server.address,
            "/latchkey.v1.TokenService/Verify",
            requests,
            b"\x08",
            lambda answer: answer.startswith(valid),
        )
        yield [Running("Latchkey", "this one", server.pid, check, delete)]


# ---- OpenFGA ----

_OPENFGA = ("openfga", "github.com/openfga/openfga/cmd/openfga", "v1.10.2")
_OPENFGA_MODEL = {
    "schema_version": "1.1",
    "type_definitions": [
        {"type": "credential"},
        {
            "type": "account",
            "relations": {"reader": {"this": {}}},
            "metadata": {
                "relations": {"reader": {"directly_related_user_types": [{"type": "credential"}]}}
            },
        },
    ],
}


@contextlib.contextmanager
def openfga(scratch: Path, database_url: str, core: int) -> Iterator[list[Running]]:
    """Run OpenFGA twice: with the defaults, and with its cache of checks. A credential is a tuple
    whose user is the secret's hash."""
    binary = program(*_OPENFGA)
    migrated([binary, "migrate", "--datastore-engine", "postgres", "--datastore-uri", database_url])
    users = [f"credential:{digest()}" for _ in range(CREDENTIALS)]
    variants = (
        ("OpenFGA", ()),
        ("OpenFGA, check cache on", ("--check-query-cache-enabled",)),
    )
    store: _Store | None = None
    running = []
    with contextlib.ExitStack() as stack:
        for name, options in variants:
            rpc, web = free_port(), free_port()
            argv = [
                *(binary, "run", "--datastore-engine", "postgres", "--datastore-uri", database_url),
                *("--grpc-addr", f"127.0.0.1:{rpc}", "--http-addr", f"127.0.0.1:{web}"),
                *("--playground-enabled=false", "--metrics-enabled=false", "--log-level", "error"),
                *options,
            ]
            pid = stack.enter_context(served(scratch, name, argv, {}, core))
            api = Api(f"127.0.0.1:{web}")
            api.wait("/healthz", pid)
            # Both servers share the store of the first.
            store = store or _Store.create(api, users)
            check = GrpcCheck(
                f"127.0.0.1:{rpc}",
                "/openfga.v1.OpenFGAService/Check",
                [store.request(user) for user in users],
                b"",
                lambda answer: answer.startswith(b"\x08\x01"),
            )
            running.append(
                Running(name, _OPENFGA[2], pid, check, partial(store.delete, api, users))
            )
        yield running


@dataclass(frozen=True, slots=True)
class _Store:
    """A store of OpenFGA, and its model."""

    store: str
    model: str

    @classmethod
    def create(cls, api: "Api", users: Sequence[str]) -> "_Store":
        store = api.post("/stores", {"name": "bench"})["id"]
        answer = api.post(f"/stores/{store}/authorization-models", _OPENFGA_MODEL)
        created = cls(store, answer["authorization_model_id"])
        for some in chunks(users):
            created.write(api, "writes", some)
        return created

    def request(self, user: str) -> bytes:
        """Return the serialised question whether a user may read the account."""
        key = text(1, user) + text(2, "reader") + text(3, f"account:{ACCOUNT}")
        return text(1, self.store) + message(2, key) + text(4, self.model)

    def delete(self, api: "Api", users: Sequence[str], number: int) -> None:
        self.write(api, "deletes", [users[number]])

    def write(self, api: "Api", kind: str, users: Sequence[str]) -> None:
        keys = [
            {"user": user, "relation": "reader", "object": f"account:{ACCOUNT}"} for user in users
        ]
        body = {kind: {"tuple_keys": keys}, "authorization_model_id": self.model}
        api.post(f"/stores/{self.store}/write", body)


# ---- SpiceDB ----

_SPICEDB = ("spicedb", "github.com/authzed/spicedb/cmd/spicedb", "v1.56.2")
_SPICEDB_SCHEMA = """
definition credential {}
definition account {
    relation reader: credential
    permission read = reader
}
"""


@contextlib.contextmanager
def spicedb(scratch: Path, database_url: str, core: int) -> Iterator[list[Running]]:
    """Run SpiceDB and check in two ways: with its default consistency, which may answer from a
    cached revision, and fully consistent. A credential is a relationship whose subject is the
    secret's hash."""
    binary = program(*_SPICEDB)
    engine = ("--datastore-engine", "postgres", "--datastore-conn-uri", database_url)
    migrated([binary, "datastore", "migrate", "head", *engine])
    key = secrets.token_hex(16)
    rpc, web, metrics = free_port(), free_port(), free_port()
    argv = [
        *(binary, "serve", *engine, "--grpc-preshared-key", key, "--log-level", "error"),
        *("--grpc-addr", f"127.0.0.1:{rpc}", "--http-enabled", "--http-addr", f"127.0.0.1:{web}"),
        *("--metrics-addr", f"127.0.0.1:{metrics}", "--telemetry-endpoint", ""),
        *("--skip-release-check", "--datastore-disable-watch-support"),
    ]
    names = [digest() for _ in range(CREDENTIALS)]
    with served(scratch, "SpiceDB", argv, {}, core) as pid:
        api = Api(f"127.0.0.1:{web}", {"Authorization": f"Bearer {key}"})
        api.wait("/openapi.json", pid)
        api.post("/v1/schema/write", {"schema": _SPICEDB_SCHEMA})
        for some in chunks(names):
            api.post("/v1/relationships/write", _spicedb_write("OPERATION_TOUCH", some))

        def delete(number: int) -> None:
            body = _spicedb_write("OPERATION_DELETE", [names[number]])
            api.post("/v1/relationships/write", body)

        # The field `consistency` is a oneof of booleans: minimize_latency is 1, fully_consistent 4.
        ways = (("SpiceDB", b"\x08\x01"), ("SpiceDB, fully consistent", b"\x20\x01"))
        running = []
        for name, consistency in ways:
            requests = [
                message(1, consistency)
                + message(2, text(1, "account") + text(2, ACCOUNT))
                + text(3, "read")
                + message(4, message(1, text(1, "credential") + text(2, credential)))
                for credential in names
            ]
            check = GrpcCheck(
                f"127.0.0.1:{rpc}",
                "/authzed.api.v1.PermissionsService/CheckPermission",
                requests,
                # The answer begins with a revision. Field 2 says HAS_PERMISSION by 2.
                b"\x0a",
                lambda answer: answer[2 + answer[1] :].startswith(b"\x10\x02"),
                (("authorization", f"Bearer {key}"),),
            )
            running.append(Running(name, _SPICEDB[2], pid, check, delete))
        yield running


def _spicedb_write(operation: str, names: Sequence[str]) -> dict[str, Any]:
    updates = [
        {
            "operation": operation,
            "relationship": {
                "resource": {"objectType": "account", "objectId": ACCOUNT},
                "relation": "reader",
                "subject": {"object": {"objectType": "credential", "objectId": name}},
            },
        }
        for name in names
    ]
    return {"updates": updates}


# ---- Ory Hydra ----

_HYDRA = ("hydra", "github.com/ory/hydra/v2", "v2.3.0")
# Issuing a token hashes the client's secret, which is not what is measured.
_HYDRA_HASH_COST = "4"


@contextlib.contextmanager
def hydra(scratch: Path, database_url: str, core: int) -> Iterator[list[Running]]:
    """Run Ory Hydra and introspect opaque access tokens, which it does not cache."""
    binary = program(*_HYDRA)
    public, admin = free_port(), free_port()
    environment = {
        "DSN": database_url,
        "SECRETS_SYSTEM": secrets.token_hex(16),
        "URLS_SELF_ISSUER": f"http://127.0.0.1:{public}",
        "SERVE_PUBLIC_HOST": "127.0.0.1",
        "SERVE_PUBLIC_PORT": str(public),
        "SERVE_ADMIN_HOST": "127.0.0.1",
        "SERVE_ADMIN_PORT": str(admin),
        "SERVE_ADMIN_REQUEST_LOG_DISABLE_FOR_HEALTH": "true",
        "OAUTH2_HASHERS_BCRYPT_COST": _HYDRA_HASH_COST,
        "LOG_LEVEL": "fatal",
        "SQA_OPT_OUT": "true",
    }
    migrated([binary, "migrate", "sql", "up", "--read-from-env", "--yes"], environment)
    argv = [binary, "serve", "all", "--dev", "--sqa-opt-out"]
    with served(scratch, "hydra", argv, environment, core) as pid:
        api = Api(f"127.0.0.1:{admin}")
        api.wait("/health/ready", pid)
        client = api.post("/admin/clients", {"grant_types": ["client_credentials"]})
        pair = f"{client['client_id']}:{client['client_secret']}".encode()
        issuer = Api(
            f"127.0.0.1:{public}", {"Authorization": f"Basic {base64.b64encode(pair).decode()}"}
        )
        form = {"grant_type": "client_credentials"}
        tokens = [issuer.form("/oauth2/token", form)["access_token"] for _ in range(CREDENTIALS)]

        def delete(number: int) -> None:
            issuer.form("/oauth2/revoke", {"token": tokens[number]})

        requests = [
            http_form(f"127.0.0.1:{admin}", "/admin/oauth2/introspect", {"token": token})
            for token in tokens
        ]
        check = HttpCheck(
            f"127.0.0.1:{admin}", requests, lambda body: json.loads(body)["active"] is True
        )
        yield [Running("Ory Hydra", _HYDRA[2], pid, check, delete)]


PRODUCTS: Mapping[str, Product] = {
    "latchkey": latchkey,
    "openfga": openfga,
    "spicedb": spicedb,
    "hydra": hydra,
}
