"""How a machine that trains and one that serves a teacher's cache know each other: one secret key, and what is signed with it.

A request is signed with a number used once, an answer with that number and the digest of what follows it, so that nobody
without the key is answered or believed, and no old answer passes for a new one. Nothing is encrypted: put the server behind
a proxy with TLS, or into a network of its own.
"""

import hashlib
import hmac
import os
import re

from cdistill.errors import InputError

KEY = "CDISTILL_CACHE_KEY"  # variable of the environment, on both machines
LEAST_KEY = 16  # characters
NONCE, SIGNATURE, DIGEST = "X-Cdistill-Nonce", "X-Cdistill-Signature", "X-Cdistill-Digest"
PREFIX = "/cdistill-cache-1/"  # of every path; the number is the protocol's
NAME = re.compile(r"/cdistill-cache-1/([0-9]+-[A-Za-z0-9_]{1,64})/(?:index\.json|shard-([0-9]{5,9})\.safetensors)")
INDEX = "index.json"
POLL_SECONDS = 10.0  # that a request waits for a shard which is being made


def shard_name(shard: int) -> str:
    """Of its file, and in a path."""
    return f"shard-{shard:05d}.safetensors"


def key_of_environment() -> bytes | None:
    """The key, None where none is set. Raises ValueError for one that can be guessed."""
    key = os.environ.get(KEY)
    if key is None:
        return None
    if len(key) < LEAST_KEY:
        raise InputError(f"{KEY} must have at least {LEAST_KEY} characters, got {len(key)}")
    return key.encode()


def signature(key: bytes, *parts: str) -> str:
    """What only those who have the key can make of the parts."""
    return hmac.new(key, "\n".join(parts).encode(), hashlib.sha256).hexdigest()


def is_signed(key: bytes, signed: str | None, *parts: str) -> bool:
    """Whether it is the signature of the parts."""
    return hmac.compare_digest((signed or "").encode(), signature(key, *parts).encode())
