"""Asking a server for the shards of a stage's cache, one ahead of what is read, for as long as it lives and makes progress."""

import hashlib
import http.client
import json
import secrets
import threading
import time
import urllib.error
import urllib.request
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from cdistill.errors import InputError
from cdistill.runtime.errors import RunError, printable
from cdistill.train.cache_wire import (
    DIGEST,
    INDEX,
    KEY,
    NONCE,
    POLL_SECONDS,
    PREFIX,
    SIGNATURE,
    is_signed,
    key_of_environment,
    shard_name,
    signature,
)

SOCKET_SECONDS = 3 * POLL_SECONDS  # without a byte, and a server does not answer
FIRST_SECONDS = 5.0  # that a run waits for a server before it has begun
LONGEST_MESSAGE = 300


def is_served(cache: str) -> bool:
    """Whether ``teacher_memory.cache`` names a server. Raises ValueError for a URL that names none."""
    if "://" not in cache:
        return False
    try:
        parts = urlsplit(cache)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        fits = False
    if not fits or parts.query or parts.fragment or parts.username or parts.path not in ("", "/"):
        raise InputError(
            f"teacher_memory.cache must be a folder or http://HOST:PORT of `cdistill cache --serve`, got {cache!r}"
        )
    return True


class Answer(NamedTuple):
    """What a server has said: its HTTP status and body."""

    status: int
    body: bytes


class NoAnswer(Exception):
    """The server is gone, slow, or not the one that has the key."""


class Served:
    """One stage of a server's cache.

    Args:
        cache: http://HOST:PORT.
        label: the stage's.
        seconds: without an answer or a new sample, and the server is given up; 0 waits for ever.
        patient: wait so long for the first answer, too, and not for a moment alone.

    Raises:
        ValueError: no key in the environment; a server that cannot be reached at the start, or that refuses.
        RunError: it is gone or makes no progress, later on.
    """

    def __init__(self, cache: str, label: str, seconds: float, *, patient: bool = True) -> None:
        self.server, self.url = cache.rstrip("/"), f"{cache.rstrip('/')}{PREFIX}{label}"
        self.seconds, self.patient, self.shards = seconds or float("inf"), patient, 0
        key = key_of_environment()
        if key is None:
            raise InputError(
                f"teacher_memory.cache: {self.server} needs {KEY} in the environment, as the server has it"
            )
        self._key = key
        self._ahead: tuple[int, threading.Thread, list[bytes]] | None = None

    def index(self) -> bytes:
        """The index of the stage."""
        return self._get(INDEX, patient=self.patient)

    def shard(self, number: int) -> bytes:
        """A shard; the next one is fetched meanwhile."""
        found = self._fetched(number)
        body = self._get(shard_name(number)) if found is None else found
        if number + 1 < self.shards:
            self._fetch(number + 1)
        return body

    def _fetch(self, number: int) -> None:
        kept: list[bytes] = []

        def fetch() -> None:
            try:
                kept.append(self._get(shard_name(number)))
            except (InputError, RunError):  # who needs it asks again, and tells
                return

        thread = threading.Thread(target=fetch, daemon=True)
        self._ahead = number, thread, kept
        thread.start()

    def _fetched(self, number: int) -> bytes | None:
        """What the thread has fetched, None if that is another shard, or if the thread was left in a parent process."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != number:
            return None
        ahead[1].join()
        return ahead[2][0] if ahead[2] else None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ahead": None}  # threads stay where they are

    def _get(self, name: str, *, patient: bool = True) -> bytes:
        seconds = self.seconds if patient else FIRST_SECONDS
        made, since, pause = None, time.monotonic(), 0.1
        while True:
            try:
                answer = self._ask(f"{PREFIX}{self.url.rpartition('/')[2]}/{name}")
            except NoAnswer as error:
                reason = f"does not answer ({error}): see whether `cdistill cache --serve` runs there"
                time.sleep(pause)
                pause = min(2 * pause, 2.0)
            else:
                if answer.status == 200:
                    return answer.body
                if answer.status != 202:
                    raise InputError(f"teacher_memory.cache: {self.server} refuses {name}: {_words(answer.body)}")
                count = json.loads(answer.body)["made"]
                if count != made:
                    made, since = count, time.monotonic()
                reason, pause = "answers, but its teacher has made no sample", 0.1
            waited = time.monotonic() - since
            if waited > seconds:
                line = f"teacher_memory.cache: {self.server} {reason}, for {waited:.0f} s"
                raise RunError(f"{line}; go on with --resume") if patient else InputError(line)

    def _ask(self, path: str) -> Answer:
        """Raises NoAnswer unless an answer came that somebody with the key has made for this request."""
        nonce = secrets.token_hex(16)
        headers = {NONCE: nonce, SIGNATURE: signature(self._key, "request", path, nonce)}
        request = urllib.request.Request(self.server + path, headers=headers)
        try:
            with _open(request) as response:
                head, status = response.headers, response.status
                digest = head.get(DIGEST, "")
                if not is_signed(self._key, head.get(SIGNATURE), "answer", path, nonce, str(status), digest):
                    raise NoAnswer(f"with status {status}, not signed with this {KEY}")
                body = response.read()
        except NoAnswer:
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: what is not HTTP at all
            raise NoAnswer(_words(str(getattr(error, "reason", error)).encode()) or type(error).__name__) from None
        if hashlib.sha256(body).hexdigest() != digest:
            raise NoAnswer("with other bytes than it has signed")
        return Answer(status, body)


def _open(request: urllib.request.Request) -> Any:
    """The response, whatever its status."""
    try:
        return urllib.request.urlopen(request, timeout=SOCKET_SECONDS)
    except urllib.error.HTTPError as error:
        return error


def _words(text: bytes) -> str:
    return printable(" ".join(text[:LONGEST_MESSAGE].decode("utf-8", "replace").split()))
