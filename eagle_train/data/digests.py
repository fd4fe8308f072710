"""Hashes of what tables hold, whatever their buffers are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc


def digest_of(table: pa.Table, texts: bytes) -> bytes:
    """Returns the hash of an index's content and of the texts' hash, in hex."""
    digest = hashlib.sha256(texts)
    for name in ("key", "reason"):
        hash_values(table[name].combine_chunks(), digest.update)
    for name, left_out in (("members", "offset"), ("media", None), ("outside", None)):
        lists = table[name].combine_chunks()
        hash_values(lists.value_lengths(), digest.update)
        values = lists.flatten()
        for part in values.type:
            if part.name != left_out:
                hash_values(values.field(part.name), digest.update)
    return digest.hexdigest()[:32].encode()


def hash_values(values: pa.Array, update: Callable[[bytes], object]) -> None:
    """Gives a hash the values of an array of numbers, strings, or lists of them, whatever its buffers are."""
    if pa.types.is_list(values.type):
        hash_values(values.value_lengths(), update)
        values = values.flatten()
    if pa.types.is_string(values.type):
        hash_values(pc.fill_null(pc.binary_length(values), -1), update)
        update("".join(filter(None, values.to_pylist())).encode())
    else:
        update(values.to_numpy(zero_copy_only=False).tobytes())
