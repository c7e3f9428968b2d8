"""Who may ask the server: requests for its own host names, and with its key where it has one."""

import ipaddress
import re
import secrets

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from luthier.infer.api_objects import ApiError

KEY_VARIABLE = "LUTHIER_API_KEY"
"""The environment variable with the key that requests must send; unset for none."""
_LOOPBACK_NAMES = ("localhost", "ip6-localhost")


class HostCheck:
    """Refuses requests for hosts that are not this server's.

    A web page whose name its owner points at this machine (DNS rebinding) would else be of the
    same origin as the server, and could read what it answers.
    """

    def __init__(self, app: ASGIApp, host: str, allowed: tuple[str, ...]) -> None:
        """`host`: what the server listens at. `allowed`: more names."""
        self._app = app
        self._names = {name.lower().rstrip(".") for name in (*_LOOPBACK_NAMES, host, *allowed)}
        address = _address(host)
        # At all addresses of the machine: any of them may be written, but no name, since only a
        # name can be pointed elsewhere.
        self._takes_addresses = address is not None and address.is_unspecified

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; this is the interface of ASGI."""
        if scope["type"] != "http" or self._is_allowed(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "The Host header names another host. Start luthier serve with --allowed-host NAME to "
            "be asked under a name of its own.",
            code="host_not_allowed",
            status=403,
        )
        await JSONResponse(error.body(), error.status)(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1:
            return False
        name = host_name(hosts[0].decode("latin-1"))
        address = _address(name)
        if address is not None and (address.is_loopback or self._takes_addresses):
            return True
        return name in self._names


_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::[0-9]{1,5})?")


def host_name(header: str) -> str:
    """Return the host of a `Host` header without its port, in small letters; empty for none."""
    match = _HOST.fullmatch(header)
    return (match[1] or match[2]).lower().rstrip(".") if match else ""


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


class KeyCheck:
    """Refuses requests to `/v1` without the server's key, as OpenAI's API does.

    `/health` and the preflight of a browser carry no key there, either.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        """`key`: what stands in a request's header `Authorization: Bearer KEY`."""
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it; this is the interface of ASGI."""
        if scope["type"] != "http" or not scope["path"].startswith("/v1") or self._has_key(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            "The key is missing or wrong. Send the server's key as the header Authorization: "
            "Bearer KEY (api_key=... of OpenAI's client).",
            code="invalid_api_key",
            status=401,
        )
        headers = {"www-authenticate": "Bearer"}
        await JSONResponse(error.body(), error.status, headers)(scope, receive, send)

    def _has_key(self, scope: Scope) -> bool:
        sent = [value for name, value in scope["headers"] if name == b"authorization"]
        # The comparison takes as long for a wrong key, whatever it begins with.
        return len(sent) == 1 and secrets.compare_digest(sent[0], self._expected)
