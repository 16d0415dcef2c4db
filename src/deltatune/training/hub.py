"""Whether the Hugging Face Hub answers: asked once, where libraries ask again and again for every file.

For a file that is not on this machine they wait about 25 s before they say that there is no connection.
"""

from __future__ import annotations

import errno
import functools
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from typing import Any, Final

from huggingface_hub import constants

__all__ = ["silence"]

_PAUSE_SECONDS: Final = 1.0
_UNREACHABLE: Final = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.ENETDOWN)


def silence() -> str | None:
    """Why nothing can be had from the Hub, in words; None where it answers, whatever it says.

    A process asks once, within ``HF_HUB_ETAG_TIMEOUT`` seconds (the Hub's own setting, 10 by default), by the proxies
    that the environment names. What else may be wrong, such as a certificate, is left to the download itself.
    """
    if constants.HF_HUB_OFFLINE:
        return f"HF_HUB_OFFLINE forbids asking {constants.ENDPOINT}"
    proxies = urllib.request.getproxies()
    if "all" in proxies and "https" not in proxies:
        return None  # a proxy that the standard library cannot use
    return _no_answer(constants.ENDPOINT, constants.HF_HUB_ETAG_TIMEOUT)


class _WithoutRedirects(urllib.request.HTTPRedirectHandler):
    """A redirect is an answer."""

    def redirect_request(self, *_: Any) -> None:
        return None


@functools.cache
def _no_answer(endpoint: str, timeout_seconds: float) -> str | None:
    reason = _ask(endpoint, timeout_seconds)
    if isinstance(reason, socket.gaierror) and reason.errno == socket.EAI_AGAIN:
        time.sleep(_PAUSE_SECONDS)  # a name server that asks to be asked again
        reason = _ask(endpoint, timeout_seconds)
    return None if reason is None else f"{endpoint} does not answer ({reason})"


def _ask(endpoint: str, timeout_seconds: float) -> OSError | None:
    """What kept an answer away; None where one came, or where it is no matter of reaching the other side."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.build_opener(_WithoutRedirects).open(request, timeout=timeout_seconds).close()
    except (urllib.error.HTTPError, HTTPException):
        return None
    except OSError as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, socket.gaierror | ConnectionError | TimeoutError):
            return reason
        return reason if isinstance(reason, OSError) and reason.errno in _UNREACHABLE else None
    return None
