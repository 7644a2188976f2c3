"""What is fetched of the web: within one deadline, and not from this machine's own net by way of a redirect."""

import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from cdistill.data import fetching
from cdistill.data.fetching import fetch, is_private


class Server(BaseHTTPRequestHandler):
    """/slow trickles a body, /headers its headers, /to/URL redirects, others hold their path."""

    def do_GET(self):
        if self.path == "/headers":
            self.trickle(b"HTTP/1.1 200 OK\r\nX: " + b"a" * 1000)
            return
        if self.path.startswith("/to/"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        self.end_headers()
        if self.path == "/slow":
            self.trickle(b"x" * 1000)
        else:
            self.wfile.write(self.path.encode())

    def trickle(self, data):
        try:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.02)
        except OSError:
            pass

    def log_message(self, *arguments):
        pass


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        running.daemon_threads = True
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_what_is_there_comes_and_no_more_than_asked(server):
    assert fetch(f"{server}/abcdef", 100) == b"/abcdef"
    assert fetch(f"{server}/abcdef", 3) == b"/abc"
    assert fetch(f"{server}/to/{server}/there", 100) == b"/there"


@pytest.mark.parametrize("path", ["slow", "headers"])
def test_a_server_that_trickles_ends_at_the_deadline(server, path):
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match=r"^not all of it came within 0\.3 s$"):
        fetch(f"{server}/{path}", 10**6, seconds=0.3)
    assert time.monotonic() - begun < 15  # all of it takes 20


def test_a_server_that_says_nothing_ends_at_the_deadline():
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TimeoutError):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/", 10, seconds=0.3)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "gopher://x"])
def test_only_http_is_fetched_also_by_redirect(server, url):
    with pytest.raises(ValueError, match="only http and https"):
        fetch(url, 10)
    with pytest.raises((ValueError, OSError)):
        fetch(f"{server}/to/{url}", 10)


def test_errors_and_nobody_there(server):
    with pytest.raises(OSError, match="404"):
        fetch(f"{server}/none", 10)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(OSError):
        fetch(f"http://127.0.0.1:{port}/", 10)


@pytest.mark.parametrize(
    ("host", "private"),
    [
        *(
            ("127.0.0.1", True),
            ("localhost", True),
            ("10.1.2.3", True),
            ("192.168.0.1", True),
            ("169.254.169.254", True),
        ),
        *(("::1", True), ("fe80::1", True), ("0.0.0.0", True), ("8.8.8.8", False), ("2606:4700::1111", False)),
    ],
)
def test_addresses_that_are_not_the_worlds(host, private):
    assert is_private(host) is private


def test_a_redirect_from_the_world_to_this_net_is_not_followed(server, monkeypatch):
    port = server.rpartition(":")[2]
    real = socket.getaddrinfo

    def named(host, *rest, **options):
        return real("127.0.0.1" if host == "images.example" else host, *rest, **options)

    monkeypatch.setattr(fetching.socket, "getaddrinfo", named)
    outside = f"http://images.example:{port}"
    assert fetch(f"{outside}/to/{outside}/there", 100) == b"/there"
    with pytest.raises(ValueError, match="an address of this machine or its net"):
        fetch(f"{outside}/to/{server}/secret", 100)
