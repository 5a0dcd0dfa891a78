"""Who may use a server: its API key, and the web pages of other origins (CORS)."""

from __future__ import annotations

import hmac
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request

from vit_static.common.errors import UserError, format_value, os_reason
from vit_static.inference.request_limits import EarlyRefusal

API_KEY_VARIABLE = "VIT_STATIC_API_KEY"
_MIN_KEY_LENGTH = 8
_ORIGIN = re.compile(r"https?://[A-Za-z0-9.\-]+(:\d{1,5})?|https?://\[[0-9A-Fa-f:.]+\](:\d{1,5})?")


@dataclass(frozen=True)
class Access:
    """Who may use a server. Without a key anybody who can connect; without origins no page of another server."""

    api_key: str | None = None
    origins: tuple[str, ...] = ()

    def check_key(self, request: Request) -> None:
        """Raise EarlyRefusal unless the request has the key, as `Authorization: Bearer KEY` or `X-API-Key: KEY`.

        The time that this takes doesn't depend on how much of the key is right.
        """
        if self.api_key is None:
            return
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
        if not hmac.compare_digest(given.encode(), self.api_key.encode()):
            message = "this server needs its API key; send the header 'Authorization: Bearer KEY'"
            raise EarlyRefusal(401, message, {"WWW-Authenticate": "Bearer"})

    def cors(self) -> list[Middleware]:
        """Return the middleware that answers a browser's questions about other origins."""
        if not self.origins:
            return []
        options = Middleware(
            CORSMiddleware,
            allow_origins=self.origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "X-API-Key", "Content-Type", "Inference-Header-Content-Length"),
            expose_headers=("Inference-Header-Content-Length", "Retry-After"),
        )
        return [options]


def read_access(key_file: Path | None, origins: Sequence[str], environ: Mapping[str, str] = os.environ) -> Access:
    """Return who may use the server: with the key in a file, or else in the environment's VIT_STATIC_API_KEY.

    A key isn't taken from the command line, which every user of the machine can read. Raises UserError for a file that
    can't be read, a key that is too short or can't be sent in a header, and for what isn't an origin. No message
    contains the key, nor the file's name, which may be a key by mistake.
    """
    for origin in origins:
        if origin != "*" and not _ORIGIN.fullmatch(origin):
            raise UserError(f"--cors {format_value(origin)}: is not an origin; write https://HOST, or * for all")
    if key_file is None and not environ.get(API_KEY_VARIABLE):
        return Access(None, tuple(origins))
    source = API_KEY_VARIABLE if key_file is None else "the file of --api-key"
    try:
        key = environ[API_KEY_VARIABLE] if key_file is None else key_file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = os_reason(error) if isinstance(error, OSError) else "it is not text"
        raise UserError(
            f"--api-key: the file can't be read ({reason}); name a file that holds the key, or put the key into the "
            f"environment variable {API_KEY_VARIABLE}; a key on the command line could be read by other users"
        ) from None
    key = key.strip()
    if len(key) < _MIN_KEY_LENGTH or not (key.isascii() and key.isprintable() and " " not in key):
        raise UserError(
            f"{source}: a key has at least {_MIN_KEY_LENGTH} printable ASCII characters without spaces; make one with "
            "'openssl rand -hex 32'"
        )
    return Access(key, tuple(origins))
