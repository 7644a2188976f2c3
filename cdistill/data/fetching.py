"""Fetching over http and https, where a data set is allowed to: one deadline for all of it, no way into this machine's net."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import threading
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from cdistill.errors import InputError

SECONDS = 20.0  # from the first packet to the last byte, redirects included


class _Deadline:
    """Ends connections when the time is over, whatever a server trickles meanwhile."""

    def __init__(self, seconds: float) -> None:
        self.over = False
        self._sockets: list[socket.socket] = []
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def __enter__(self) -> _Deadline:
        self._timer.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._timer.cancel()

    def watch(self, connected: socket.socket) -> None:
        self._sockets.append(connected)
        if self.over:
            self._end()

    def _end(self) -> None:
        self.over = True
        for connected in self._sockets:
            try:
                connected.shutdown(socket.SHUT_RDWR)
            except OSError:  # closed already
                continue


class _Handler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections that the deadline watches."""

    def __init__(self, deadline: _Deadline) -> None:
        urllib.request.HTTPSHandler.__init__(self)
        self._deadline = deadline

    def http_open(self, request: Any) -> Any:
        return self.do_open(self._watched(http.client.HTTPConnection), request)

    def https_open(self, request: Any) -> Any:
        return self.do_open(self._watched(http.client.HTTPSConnection), request)

    def _watched(self, kind: Any) -> Any:
        deadline = self._deadline

        class Watched(kind):
            def connect(self) -> None:
                super().connect()
                deadline.watch(self.sock)

        return Watched


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within http and https, from the world to the world."""

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
        here, there = urlsplit(request.full_url), urlsplit(url)
        if there.scheme not in ("http", "https"):
            raise InputError(f"it redirects to {url[:200]!r}, which is not fetched")
        if there.hostname != here.hostname and is_private(there.hostname or ""):
            raise InputError(f"it redirects to {url[:200]!r}, an address of this machine or its net")
        return super().redirect_request(request, file, code, message, headers, url)


def is_private(host: str) -> bool:
    """Whether a name is, or leads to, an address that is not the world's."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return False  # it leads nowhere
    return any(not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_global for *_, address in found)


def fetch(url: str, most: int, *, seconds: float = SECONDS) -> bytes:
    """What a URL holds, of ``most`` bytes at most and one more that tells of further ones.

    Raises:
        ValueError: no http or https, or a redirect that is not followed.
        OSError: it cannot be had within ``seconds``.
    """
    if not url.startswith(("http://", "https://")):
        raise InputError(f"only http and https are fetched: {url[:200]!r}")
    with _Deadline(seconds) as deadline:
        opener = urllib.request.OpenerDirector()
        for handler in (
            _Handler(deadline),
            _Redirects(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            opener.add_handler(handler)
        if proxies := urllib.request.getproxies():
            opener.add_handler(urllib.request.ProxyHandler(proxies))
        try:
            with opener.open(url, timeout=seconds) as reply:
                data: bytes = reply.read(most + 1)
        except (OSError, http.client.HTTPException) as error:
            if deadline.over:
                raise TimeoutError(f"not all of it came within {seconds:g} s") from None
            if isinstance(error, OSError):
                raise
            raise OSError(f"{type(error).__name__}: {error}") from None
        if deadline.over:
            raise TimeoutError(f"not all of it came within {seconds:g} s")
        return data
