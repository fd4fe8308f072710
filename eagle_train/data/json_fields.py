"""Fields of JSON records, checked: what is not of the right type is a `bad_record` that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from eagle_train.types import SampleError


def load_object(data: bytes, key: str) -> dict[str, Any]:
    """Returns the JSON object in `data`."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise bad_record(key, f"json cannot be parsed: {error}") from error
    if not isinstance(record, dict):
        raise bad_record(key, f"json is a {type(record).__name__}; a record is an object")
    return record


def objects(value: Any, key: str, name: str) -> list[Mapping[str, Any]]:
    """Returns `value` if it is a list of JSON objects."""
    if not isinstance(value, list) or not all(isinstance(item, (dict, Mapping)) for item in value):  # dict is quicker
        raise bad_record(key, f"{name} is {repr(value)[:80]}; it must be a list of objects")
    return value


def text(value: Any, key: str, name: str) -> str:
    """Returns `value` if it is a string."""
    if not isinstance(value, str):
        raise bad_record(key, f"{name} is {repr(value)[:80]}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON lets halves of surrogate pairs through; no tokenizer does
        raise bad_record(key, f"{name} is no valid Unicode: {error}") from error
    return value


def bad_record(key: str, detail: str) -> SampleError:
    """Returns the error of an annotation that cannot be used."""
    return SampleError(key, "bad_record", detail)
