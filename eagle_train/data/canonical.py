"""Canonical records that an index has accepted, read again without a second look at what was checked then.

Every sample is read in every epoch, and checking a record takes four times as long as taking out its turns.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eagle_train.types import Message, Role

FIELDS = frozenset({"messages", "media", "meta"})
TURN_FIELDS = frozenset({"role", "content"})
ROLES: Mapping[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}


def canonical_messages(record: Mapping[str, Any], num_media: int) -> tuple[Message, ...] | None:
    """Returns what `schemas.parse_members` finds in a canonical record that it accepts, None if it must look itself.

    Args:
        record: the object of a `json` member.
        num_media: of the sample, by its index.
    """
    if record.keys() != FIELDS:
        return None
    placed = 0
    messages = []
    try:
        for turn in record["messages"]:
            if turn.keys() != TURN_FIELDS or type(turn["content"]) is not list:
                return None
            parts: list[str | int] = []
            for part in turn["content"]:
                if part["type"] == "text":
                    if type(text := part["text"]) is not str:
                        return None
                    if text and parts and isinstance(parts[-1], str):
                        parts[-1] += text
                    elif text:
                        parts.append(text)
                elif part["type"] == "media" and part["index"] == placed:
                    parts.append(placed)
                    placed += 1
                else:
                    return None
            messages.append(Message(role=ROLES[turn["role"]], content=tuple(parts)))
    except (AttributeError, KeyError, TypeError):
        return None
    return tuple(messages) if placed == num_media and isinstance(record["meta"], dict) else None
