"""Media that records name otherwise than by a file: on the web, or within the record. Only this module fetches them.

https://host/picture.jpg           fetched, within limits of size and time
data:image/png;base64,iVBORw0...   decoded
raw bytes                          become the form before where a record is read, see `inline`
"""

from __future__ import annotations

import base64
import binascii
import http.client
import re
import socket
import ssl
import time
import urllib.error
import urllib.request

from eagle_train.data.locations import shown
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.retries import Retries, StorageError
from eagle_train.data.shards import MAX_MEMBER_BYTES
from eagle_train.types import SampleError

ADDRESS = re.compile(r"(data:|[A-Za-z][A-Za-z0-9+.-]*://)")
"""How what is no path begins."""
FILE = "file://"
WEB = ("http://", "https://")
HEAD = re.compile(r"data:[^,]*;base64,", re.IGNORECASE)
TIMEOUT_SECONDS = 30.0
"""For a connection and for each wait for more; all of a medium may take `TOTAL_SECONDS`."""
TOTAL_SECONDS = 300.0
CHUNK_BYTES = 1 << 20
BRIEF = Retries(attempts=3, backoff_seconds=0.2)
"""For a question, or a record that is left out if its media cannot be had."""


def is_address(text: str) -> bool:
    """Returns whether a medium is named by an address that `read_address` reads, not by a path or `file://`."""
    return ADDRESS.match(text) is not None and not text.startswith(FILE)


def inline(data: bytes) -> str:
    """Returns raw bytes as an address that holds them."""
    return f"data:;base64,{base64.b64encode(data).decode()}"


def named(text: str) -> str:
    """Returns how a medium is named in messages: without the pixels, user name or signature that it may hold."""
    return repr(shown(text[:100]))


def read_address(ref: MediaRef, key: str, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Returns the bytes of a medium at an address.

    Args:
        ref: a medium whose `ref` `is_address`.
        key: names the sample in errors.
        max_bytes: the most that a medium may have.

    Raises:
        SampleError: `missing_media` if it cannot be fetched, `unreadable_...` if it is too large or no base64, and
            `bad_record` for a protocol that is not read.
    """
    if ref.ref.startswith("data:"):
        return decode(ref, key, max_bytes)
    if not ref.ref.startswith(WEB):
        known = "a path, file://, http://, https:// or data:...;base64,..."
        raise SampleError(key, "bad_record", f"{named(ref.ref)} is read no such way; a medium is {known}")
    try:
        return fetch_medium(ref, key, BRIEF, max_bytes)
    except StorageError as error:
        last = error.__cause__.__cause__
        detail = f"{named(ref.ref)} cannot be fetched ({last}); if this machine has no network, name local files"
        raise SampleError(key, "missing_media", detail) from error


def fetch_medium(ref: MediaRef, key: str, retries: Retries, max_bytes: int = MAX_MEMBER_BYTES) -> bytes:
    """Returns the bytes at a URL, asked for again where that may help.

    Args:
        ref: a medium on the web.
        key: names the sample in errors.
        retries: how often to ask.
        max_bytes: the most that it may have.

    Raises:
        SampleError: `missing_media` if it is not there, or there is no such server, and `unreadable_...` if it is too
            large.
        StorageError: if the server, or the network, does not answer: then it may well be there.
    """
    try:
        data = retries.run(lambda: fetch(ref.ref, max_bytes), may_pass, ref.ref)
    except StorageError as error:
        remedy = "without a network, `data build` from these tars where there is one, which stores the media"
        raise StorageError(f"{key}: {error}; {remedy}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = error if isinstance(error, urllib.error.HTTPError) else getattr(error, "reason", None) or error
        remedy = "; if this machine has no network, name local files" if isinstance(reason, socket.gaierror) else ""
        raise SampleError(key, "missing_media", f"{named(ref.ref)} cannot be fetched ({reason}){remedy}") from error
    if len(data) > max_bytes:
        raise too_large(ref, key, max_bytes)
    return data


def may_pass(error: Exception) -> bool:
    """Returns whether an error of `fetch` may go away by itself: not that of a page or a server that does not exist."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (408, 425, 429) or error.code >= 500
    reason = getattr(error, "reason", None)
    if isinstance(reason, socket.gaierror):
        return reason.errno == socket.EAI_AGAIN
    if isinstance(reason, ssl.SSLCertVerificationError):
        return False
    return isinstance(error, (OSError, http.client.HTTPException)) and not isinstance(error, http.client.InvalidURL)


def fetch(url: str, max_bytes: int) -> bytes:
    """Returns the content at a URL; of one that is larger than `max_bytes`, a byte more than that.

    Raises:
        OSError: if it cannot be had in time.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "eagle_train"})
    deadline = time.monotonic() + TOTAL_SECONDS
    parts, count = [], 0
    with open_url(request) as answer:
        while count <= max_bytes and (part := answer.read(min(CHUNK_BYTES, max_bytes + 1 - count))):
            if time.monotonic() > deadline:
                raise TimeoutError(f"more than {TOTAL_SECONDS:.0f} s for {count} bytes")
            parts.append(part)
            count += len(part)
        if answer.length and count <= max_bytes:  # of a connection that broke, `read` says nothing
            raise OSError(f"it ended {answer.length} bytes early")
    return b"".join(parts)


def open_url(request: urllib.request.Request) -> http.client.HTTPResponse:
    """Returns the answer to a request; raises as `urllib.request.urlopen`, with nothing left open."""
    try:
        return urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()  # it is the answer too
        raise


def decode(ref: MediaRef, key: str, max_bytes: int) -> bytes:
    """Returns the bytes that a `data:` address holds.

    Raises:
        SampleError: `unreadable_...`.
    """
    head = HEAD.match(ref.ref)
    if head is None:
        detail = f"{named(ref.ref)}: only data:...;base64,... is read"
        raise SampleError(key, f"unreadable_{ref.kind}", detail)
    if (len(ref.ref) - head.end()) * 3 // 4 > max_bytes + 2:  # two of padding
        raise too_large(ref, key, max_bytes)
    try:
        return base64.b64decode("".join(ref.ref[head.end() :].split()), validate=True)
    except binascii.Error as error:
        raise SampleError(key, f"unreadable_{ref.kind}", f"{named(ref.ref)} is no base64: {error}") from error


def too_large(ref: MediaRef, key: str, max_bytes: int) -> SampleError:
    """Returns the error of a medium that has too many bytes."""
    detail = f"{named(ref.ref)} has more than {max_bytes} bytes; split or compress it"
    return SampleError(key, f"unreadable_{ref.kind}", detail)
