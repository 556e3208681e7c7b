"""Authentication: what moves a replica needs the token, and a replica reads no other bucket than its own."""

from __future__ import annotations

import hmac
import subprocess
import sys
import threading
import uuid
from http.server import BaseHTTPRequestHandler, HTTPServer
from inspect import signature
from pathlib import Path

import pytest
from fastapi.routing import APIRoute
from starlette.routing import Route

from tests.chains import commit_state
from tests.serving.http.test_app import AUTHORIZED, AppClient
from tests.serving.model_chains import engine_bits, make_chain, trained
from tests.serving.servers import TOKEN, running_replica
from weightline.chain import Chain
from weightline.errors import ApplyError, InputError, SignatureError
from weightline.format.signature import SIGNING_KEY_VARIABLE, generate_key, load_trusted_keys
from weightline.serving.engines.transformers import TransformersEngine
from weightline.serving.http import client
from weightline.serving.http.auth import is_authorized, is_loopback
from weightline.serving.http.server import ServerSettings, serve
from weightline.serving.http.service import ReplicaService
from weightline.serving.http.weight_push import PUSH_ROUTES
from weightline.serving.replica.replica import Replica

#: Everything else that the app has moves something, and needs the token.
OPEN = {
    ("GET", "/v1/models"), ("POST", "/v1/completions"), ("POST", "/v1/chat/completions"), ("GET", "/health"),
    ("GET", "/ready"), ("POST", "/weightline/rollouts"),
    ("GET", "/weightline/status"), ("GET", "/weightline/version"), ("GET", "/metrics"),
}  # fmt: skip


@pytest.fixture
def app_client(replica: Replica) -> AppClient:
    return AppClient(ReplicaService(replica))


def test_every_route_that_is_not_for_everybody_needs_the_token(app_client: AppClient) -> None:
    routes = [route for route in app_client.app.routes if isinstance(route, APIRoute)]
    refusing = [route for route in app_client.app.routes if isinstance(route, Route) and route not in routes]
    assert len(routes) + len(refusing) == len(app_client.app.routes), "no mounted apps, no documentation"
    assert {(method, route.path) for route in refusing for method in route.methods or ()} >= set(PUSH_ROUTES)
    for route in refusing:
        for method in route.methods or ():
            assert app_client.ask(method, route.path, headers=AUTHORIZED).status_code == 501
    shut = {(method, route.path) for route in routes for method in route.methods} - OPEN
    assert shut == {("POST", "/weightline/refresh")}
    for method, path in shut:
        for headers in ({}, {"authorization": "Bearer wrong"}):
            assert app_client.ask(method, path, {}, headers).status_code == 401


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/weightline/pause", "/weightline/admin"])
def test_there_are_no_other_routes(app_client: AppClient, path: str) -> None:
    assert app_client.ask("GET", path, headers=AUTHORIZED).status_code == 404


def test_a_refused_refresh_moves_nothing_and_says_nothing_of_the_chain(app_client: AppClient, replica: Replica) -> None:
    before = engine_bits(replica.engine)  # type: ignore[arg-type]
    answer = app_client.refresh(headers={"authorization": "Bearer wrong"}, version=1)
    assert answer.status_code == 401
    assert "memory://" not in answer.text
    assert replica.version == 0
    assert engine_bits(replica.engine).keys() == before.keys()  # type: ignore[arg-type]


def test_tokens_are_compared_in_constant_time() -> None:
    """By the default of the parameter, and also where the scheme is wrong already."""
    compared: list[tuple[bytes, bytes]] = []

    def watched(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return hmac.compare_digest(a, b)

    assert signature(is_authorized).parameters["is_same"].default is hmac.compare_digest
    assert is_authorized(f"Bearer {TOKEN}", TOKEN, watched)
    assert not is_authorized(f"Basic {TOKEN}", TOKEN, watched)
    assert not is_authorized(None, TOKEN, watched)
    assert len(compared) == 3


def test_another_bucket_or_chain_is_refused(app_client: AppClient, replica: Replica) -> None:
    for other in ("memory://elsewhere/toy", replica.chain.url + "2", replica.chain.url.rpartition("/")[0], ""):
        answer = app_client.refresh(version=1, chain=other)
        assert answer.status_code == 400
        assert answer.json()["error"]["facts"]["field"] == "chain"
        assert replica.version == 0
    assert app_client.refresh(version=1, chain=replica.chain.url).json()["version"] == 1


def test_the_client_says_which_chain_it_means(tmp_path: Path) -> None:
    grown = make_chain(f"memory://{uuid.uuid4().hex}/toy")
    with running_replica(grown.chain, tmp_path, "r") as opened:
        with pytest.raises(InputError, match="this replica follows"):
            client.refresh(opened.url, TOKEN, 0, chain="memory://elsewhere")
        assert opened.replica.version is None
        assert client.refresh(opened.url, TOKEN, 0, chain=grown.chain.url).version == 0


def test_what_is_no_replica_is_told_apart() -> None:
    """Something else may listen on the port of a replica that is gone."""

    class Stranger(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Stranger) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ApplyError, match="is not a replica") as caught:
            client.status(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
    assert caught.value.is_unreachable


@pytest.mark.parametrize(
    ("host", "is_home"),
    [("127.0.0.1", True), ("127.9.9.9", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("localhost.evil.example", False), ("", False)],
)  # fmt: skip
def test_what_only_this_machine_can_reach(host: str, is_home: bool) -> None:
    assert is_loopback(host) is is_home


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "myhost"])
def test_an_address_that_others_can_reach_needs_a_token_that_somebody_chose(
    host: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WEIGHTLINE_TOKEN", raising=False)
    settings = ServerSettings("memory://nothing/toy", tmp_path / "state", host=host, port=0)
    with pytest.raises(InputError, match=r"other machines can reach .*: choose a token"):
        serve(settings)
    assert not (tmp_path / "state").exists()


def test_a_lease_does_not_name_an_address_that_is_none() -> None:
    anywhere = ServerSettings("memory://x", Path("s"), host="0.0.0.0")
    assert anywhere.presence(80).url is None
    told = ServerSettings("memory://x", Path("s"), host="0.0.0.0", advertise_url="http://gpu-7:8000")
    assert told.presence(80).url == "http://gpu-7:8000"
    assert ServerSettings("memory://x", Path("s"), host="::1").presence(80).url == "http://[::1]:80"


@pytest.mark.parametrize("how", ["unsigned", "altered"])
def test_a_replica_that_demands_signatures_moves_to_nothing_else(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate_key(tmp_path / "key")
    trusted = load_trusted_keys(tmp_path / "key.pub")
    monkeypatch.setenv(SIGNING_KEY_VARIABLE, str(tmp_path / "key"))
    grown = make_chain(f"memory://{uuid.uuid4().hex}/toy", num_versions=2)
    if how == "unsigned":
        monkeypatch.delenv(SIGNING_KEY_VARIABLE)
    evil = trained(grown.states[-1], 666)
    manifest = commit_state(grown.chain, evil, grown.states[-1])
    if how == "altered":
        grown.chain.store.put(manifest.key, manifest.model_copy(update={"run_id": "other"}).to_bytes())
    demanding = Chain(grown.chain.store, trusted)
    replica = Replica(demanding, TransformersEngine("cpu"), tmp_path / "state", "r")
    service = ReplicaService(replica)
    assert service.refresh(1).version == 1
    with pytest.raises(SignatureError, match="not signed by a trusted key"):
        service.refresh(2)
    assert replica.version == 1
    assert "not signed" in str(replica.status().last_error)
    with running_replica(demanding, tmp_path / "replica", "d", version=0) as opened:
        with pytest.raises(SignatureError):
            client.refresh(opened.url, TOKEN, 2)
        assert client.refresh(opened.url, TOKEN, 1).version == 1


@pytest.mark.process
def test_reading_unsigned_chains_imports_no_cryptography() -> None:
    program = "import sys, weightline.serving.http.server, weightline.cli.main; print('cryptography' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
