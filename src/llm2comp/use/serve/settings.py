"""What a server accepts, who may call it, and where. Nothing heavy is imported."""

from __future__ import annotations

import hashlib
import hmac
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llm2comp.errors import RunError

LEAST_KEY = 8


@dataclass(frozen=True)
class Keys:
    """API keys, as digests: a key itself is neither kept nor shown. Without any, all may call."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Iterable[str]) -> Keys:
        """From the keys themselves."""
        return cls(tuple(hashlib.sha256(key.encode()).digest() for key in keys))

    @classmethod
    def read(cls, file: Path | None, key: str | None) -> Keys:
        """From a file, one key a line (empty lines and those that begin with # are left out), and
        one more.

        Raises:
            RunError: no such file, no key in it, or one that is too short.
        """
        try:
            lines = file.read_text(encoding="utf-8-sig").splitlines() if file else []
        except (OSError, UnicodeDecodeError) as error:
            raise RunError("cannot be read", where=str(file), found=error) from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if file and not found:
            raise RunError("holds no key", where=str(file), expected="a key per line")
        found += [key] if key is not None else []
        if any(len(key) < LEAST_KEY for key in found):
            raise RunError("an API key is too short", expected=f"{LEAST_KEY} characters or more")
        return cls.of(found)

    def allow(self, given: str) -> bool:
        """Whether a caller with this key may pass; takes as long whichever key it is."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogateescape")).digest()
        return not self.digests or sum(hmac.compare_digest(digest, d) for d in self.digests) > 0


@dataclass(frozen=True)
class Settings:
    """Limits of one request, and of all that wait.

    Args:
        keys: who may call.
        max_texts: texts of one request.
        max_body_bytes: its body.
        max_waiting_tokens: a request is refused while so many tokens wait; None: by the device.
        deadline_seconds: from its arrival to its answer, and for its body to arrive.
        max_connections: more than these are refused; a client holds several.
        drain_seconds: for what is under way once the server is told to stop.
    """

    keys: Keys = Keys()
    max_texts: int = 2048
    max_body_bytes: int = 16 * 2**20
    max_waiting_tokens: int | None = None
    deadline_seconds: float = 60.0
    max_connections: int = 1024
    drain_seconds: float = 30.0


def listen(host: str, port: int) -> socket.socket:
    """A socket at an address, which nobody can connect to yet.

    Raises:
        RunError: no such address, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, OverflowError) as error:
        problem = "cannot listen there"
        raise RunError(problem, where=f"{host}:{port}", found=error, fix="--host, --port") from None
    return found
