"""Pages of the recipe's origins may call with any client; those of others learn nothing."""

from collections.abc import Callable, Iterator

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.testclient import TestClient

from vpo_ray.recipe import Serve
from vpo_ray.serve.http import Cors, application

UI = "https://ui.example"
# What OpenAI's JavaScript client sends, and what proxies and tracers add.
SENT = (
    "authorization,content-type,x-stainless-arch,x-stainless-lang,x-stainless-os,x-stainless-package-version,"
    "x-stainless-retry-count,x-stainless-runtime,x-stainless-runtime-version,x-stainless-timeout,"
    "x-stainless-helper-method,openai-organization,openai-project,openai-beta,idempotency-key,traceparent,"
    "tracestate,baggage,x-request-id,x-my-proxy"
)


@pytest.fixture
def page() -> Iterator[Callable[..., TestClient]]:
    """Opens an endpoint with one route to the pages of some origins."""
    before = Cors.origins

    def start(*origins: str) -> TestClient:
        http: FastAPI = application()

        @http.post("/v1/chat/completions")
        async def answer() -> JSONResponse:
            return JSONResponse({}, 429, headers={"Retry-After": "3"})

        Cors.origins = list(origins)
        return TestClient(http)

    yield start
    Cors.origins = before


def preflight(
    client: TestClient, origin: str = UI, asked: str = SENT, method: str = "POST"
) -> httpx.Response:
    headers = {"Origin": origin, "Access-Control-Request-Method": method}
    if asked:
        headers["Access-Control-Request-Headers"] = asked
    return client.options("/v1/chat/completions", headers=headers)


def admitted(reply: httpx.Response) -> set[str]:
    return {name.strip().lower() for name in reply.headers["access-control-allow-headers"].split(",")}


@pytest.mark.parametrize("asked", [SENT, SENT.upper(), SENT.replace(",", ", "), ""])
@pytest.mark.parametrize("origins", [[UI], ["*"], ["https://other.example", "https://*.example"]])
def test_an_admitted_page_may_send_what_its_client_sends(
    page: Callable[..., TestClient], origins: list[str], asked: str
) -> None:
    reply = preflight(page(*origins), asked=asked)
    assert reply.status_code == 200
    assert reply.headers["access-control-allow-origin"] in (UI, "*")
    assert not asked or admitted(reply) == set(SENT.split(","))
    assert "POST" in reply.headers["access-control-allow-methods"]
    assert "access-control-allow-credentials" not in reply.headers


def test_whatever_openais_python_client_sends_is_admitted(page: Callable[..., TestClient]) -> None:
    sent: list[str] = []

    def note(request: httpx.Request) -> httpx.Response:
        sent.extend(request.headers)
        return httpx.Response(200, json={"object": "list", "data": []})

    with httpx.Client(transport=httpx.MockTransport(note)) as http:
        client = openai.OpenAI(base_url="http://x/v1", api_key="k", organization="o", http_client=http)
        client.with_options(timeout=3).models.list()
    assert "x-stainless-lang" in sent
    assert set(sent) <= admitted(preflight(page(UI), asked=",".join(sent)))


@pytest.mark.parametrize("origins", [[UI], ["*"]])
def test_a_page_reads_why_it_is_refused(page: Callable[..., TestClient], origins: list[str]) -> None:
    reply = page(*origins).post("/v1/chat/completions", headers={"Origin": UI})
    exposed = reply.headers["access-control-expose-headers"].lower()
    assert reply.headers["access-control-allow-origin"] in (UI, "*")
    assert all(name in exposed for name in ("retry-after", "x-request-id", "x-ratelimit-remaining-requests"))


@pytest.mark.parametrize(
    ("origins", "origin"),
    [
        ([UI], "https://evil.example"),
        ([UI], "http://ui.example"),
        ([UI], "https://ui.example:8443"),
        ([UI], "https://ui.example.evil.org"),
        ([UI], "null"),
        (["https://*.example"], "https://example"),
        (["https://*.example"], "https://a.example.evil.org"),
        (["https://*.example"], "https://evil.org/.example"),
        (["https://*.example"], "http://a.example"),
        (["http://localhost:*"], "http://localhost.evil.org:1"),
        (["https://a.example"], "https://axexample"),
    ],
)
def test_other_pages_get_nothing(page: Callable[..., TestClient], origins: list[str], origin: str) -> None:
    client = page(*origins)
    reply = preflight(client, origin)
    assert reply.status_code == 400
    assert not [
        name
        for name in reply.headers
        if name in ("access-control-allow-origin", "access-control-allow-headers")
    ]
    reply = client.post("/v1/chat/completions", headers={"Origin": origin})
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("listed", "origin"),
    [
        ("https://UI.example/", "https://ui.example"),
        ("https://ui.example:443", "https://ui.example"),
        ("http://ui.example:8080", "http://ui.example:8080"),
        ("http://localhost:*", "http://localhost:5173"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("https://*.example", "https://a.b.example"),
        ("null", "null"),
        ("chrome-extension://abcdef", "chrome-extension://abcdef"),
    ],
)
def test_origins_are_meant_as_browsers_send_them(
    page: Callable[..., TestClient], listed: str, origin: str
) -> None:
    for given in (listed, *Serve(cors_origins=[listed]).cors_origins):
        assert preflight(page(given), origin).headers["access-control-allow-origin"] == origin


def test_only_names_of_headers_come_back(page: Callable[..., TestClient]) -> None:
    reply = preflight(page(UI), asked="x-good, bad header, <script>, x\tz, " + "a" * 500 + ", " + "y," * 5000)
    assert admitted(reply) == {"x-good", "y"}
    assert len(reply.headers["access-control-allow-headers"]) < 1000
    assert preflight(page(UI), method="DELETE").status_code == 400


@pytest.mark.parametrize("origin", ["ui.example", "https://ui.example/app", "https://", "", "https://a b"])
def test_what_is_no_origin_is_told_when_the_recipe_is_read(origin: str) -> None:
    with pytest.raises(ValidationError, match="is no origin"):
        Serve(cors_origins=[origin])
