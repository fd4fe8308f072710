"""Annotations of other projects, recognised by their keys, become one form: the canonical record.

    {"messages": [{"role": "user", "content": [{"type": "media", "index": 0}, {"type": "text", "text": "Why?"}]}, ...],
     "media": [{"kind": "image", "member": "0.png"}],
     "meta": {...}}

Every medium is placed exactly once and `media` is in reading order, so what is decoded in that order lands where
the conversation has it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from eagle_train.data.placeholders import Listed, MediaRef, Part, Slot, Turn, fill_slots, media_kind, place_listed
from eagle_train.types import MediaKind, Message, Role, SampleError

ACCEPTED_SHAPES = (
    "messages or conversations (role/content or from/value), instruction+output, question+answer, "
    "caption or text with one image"
)
ROLES: Mapping[str, Role] = {
    "system": "system", "human": "user", "user": "user", "observation": "user", "gpt": "assistant",
    "assistant": "assistant",
}  # fmt: skip
MEDIA_KEYS: Mapping[str, MediaKind] = {
    "image": "image", "images": "image", "image_list": "image", "video": "video", "videos": "video",
    "video_list": "video",
}  # fmt: skip
MEDIA_LISTS = (*MEDIA_KEYS, "data", "media")
ONE_TURN = (frozenset({"instruction", "output"}), frozenset({"question", "answer"}))
NO_MEDIA = frozenset({"", "none", "nan"})
"""What some sets (Cambrian) write for "no image"."""


@dataclass(frozen=True, slots=True)
class Record:
    """One annotation; the ints in `messages` count through `media` in reading order."""

    messages: tuple[Message, ...]
    media: tuple[MediaRef, ...]
    meta: dict[str, Any]


def parse_record(record: Mapping[str, Any], *, key: str) -> Record:
    """Returns the conversation of an annotation in any of the accepted shapes.

    Placeholders (`<image>`, `<video>`, or numbered: `<image-2>`) give way to the media; the text around them is
    kept as it is. Media without any placeholder go to the front of the first user turn, each followed by a newline.
    In a record without media, and beside typed content, a literal `<image>` is text.

    Args:
        record: canonical, LLaVA, ShareGPT, typed content (OpenAI, Qwen, LLaMA-Factory), Eagle 2.5, alpaca,
            question/answer, or a caption; what is not part of the conversation becomes `meta`.
        key: names the sample in errors.

    Raises:
        SampleError: `placeholder_mismatch` with both numbers, `no_answer`, or `bad_record` for anything else, such
            as an unknown role, turns that do not alternate from user to assistant, or text that is no string.
    """
    return _parse(record, key, {})


def parse_members(members: Mapping[str, bytes], *, key: str) -> Record:
    """Returns the conversation of a WebDataset sample; every `ref` of it is a member.

    The `json` member is a record as `parse_record` takes it. A reference in it finds the member of that extension,
    the one of that file name (`<key>.jpg`), or the only one of its kind; if it names no media, the media members
    are its media. Without a conversation the sample is a caption pair: one image, and `txt` or the json's `caption`.

    Args:
        members: contents by extension (`json`, `0.png`); contents of media are not looked at.
        key: tar key of the sample.

    Raises:
        SampleError: as `parse_record`, and `missing_media` for a reference without a member.
    """
    record = _load_object(members["json"], key) if "json" in members else {}
    media = [MediaRef(kind, name) for name in members if (kind := media_kind(name))]
    if not _has_conversation(record):
        return _parse_caption(members, record, media, key)
    present: Listed = {}
    for ref in media:
        present.setdefault(ref.kind, []).append(ref)
    parsed = _parse(record, key, present)
    found = tuple(_find_member(ref, parsed.media, members, media, key) for ref in parsed.media)
    return Record(parsed.messages, found, parsed.meta)


def to_canonical(record: Record, members: Sequence[str]) -> dict[str, Any]:
    """Returns the canonical json of a record whose i-th medium is stored as `members[i]` (`0.png`, ...)."""
    media = [{"kind": ref.kind, "member": name} for ref, name in zip(record.media, members, strict=True)]
    messages = [
        {
            "role": message.role,
            "content": [
                {"type": "media", "index": part} if isinstance(part, int) else {"type": "text", "text": part}
                for part in message.content
            ],
        }
        for message in record.messages
    ]
    return {"messages": messages, "media": media, "meta": record.meta}


def _parse(record: Mapping[str, Any], key: str, present: Listed) -> Record:
    """Returns the parsed record; `present` are the media of a record that names none itself."""
    if not isinstance(record, Mapping):
        raise _bad(key, f"a record is a JSON object, not {type(record).__name__}")
    listed, used = _listed_media(record, key)
    turns, fields = _read_turns(record, listed, key)
    used |= fields | {"meta"}
    if "system" in record:
        used.add("system")
        turns = [("system", [_text(record["system"], key, "system")]), *turns] if record["system"] else turns
    _check_turns(turns, key)
    typed = [part for _, content in turns for part in content if not isinstance(part, str)]
    if not listed and not any(isinstance(part, MediaRef) for part in typed):
        listed = present
    if listed and not typed:
        turns, listed = place_listed(turns, listed)
    messages, media = fill_slots(turns, listed, key)
    meta = {name: value for name, value in record.items() if name not in used}
    nested = record.get("meta", {})
    return Record(messages, media, meta | (nested if isinstance(nested, dict) else {"meta": nested}))


def _listed_media(record: Mapping[str, Any], key: str) -> tuple[Listed, set[str]]:
    """Returns the media that the record lists beside the conversation, and the keys that list them."""
    used = {name for name in MEDIA_LISTS if name in record}
    found = [(name, MEDIA_KEYS[name], record[name]) for name in MEDIA_KEYS if name in used]
    # Eagle 2.5: [{"type": "image", "image_list": [...]}, {"type": "video", "video_list": [...]}]
    for group in _objects(record["data"], key, "data") if "data" in used else ():
        found += [(f"data.{name}", kind, group[name]) for name, kind in MEDIA_KEYS.items() if name in group]
    listed: Listed = {}
    for name, kind, value in found:
        if paths := _paths(value, key, name):
            if kind in listed:
                raise _bad(key, f"more than one list of {kind}s: {', '.join(n for n, k, _ in found if k == kind)}")
            listed[kind] = [MediaRef(kind, path) for path in paths]
    for medium in _objects(record["media"], key, "media") if "media" in used else ():
        if medium.get("kind") not in ("image", "video"):
            raise _bad(key, f"media kind {medium.get('kind')!r}; known are 'image' and 'video'")
        member = _text(medium.get("member"), key, "media member")
        listed.setdefault("media", []).append(MediaRef(medium["kind"], member))
    return listed, used


def _paths(value: Any, key: str, name: str) -> list[str]:
    """Returns the paths of a media field: one string, a list of them, or nothing in any of its spellings."""
    if value is None or value != value or (isinstance(value, str) and value.strip().lower() in NO_MEDIA):
        return []  # NaN is the one JSON value that differs from itself
    paths = value if isinstance(value, list) else [value]
    if bad := [path for path in paths if not isinstance(path, str) or not path.strip()]:
        raise _bad(key, f"{name} holds {repr(bad[0])[:80]}; media are named by path strings (cut clips to files)")
    return paths


def _has_conversation(record: Mapping[str, Any]) -> bool:
    """Returns whether a json member holds turns, not only a caption or nothing of use."""
    return "messages" in record or "conversations" in record or any(record.keys() >= keys for keys in ONE_TURN)


def _read_turns(record: Mapping[str, Any], listed: Listed, key: str) -> tuple[list[Turn], set[str]]:
    """Returns the turns of a record, and the keys they were read from."""
    for name in ("messages", "conversations"):
        if name in record:
            return [_read_turn(turn, key) for turn in _objects(record[name], key, name)], {name}
    if {"instruction", "output"} <= record.keys():
        if record.get("history"):
            raise _bad(key, "history holds earlier turns; write the whole conversation as messages")
        question = _text(record["instruction"], key, "instruction")
        if extra := record.get("input"):
            question += f"\n{_text(extra, key, 'input')}"
        answer = _text(record["output"], key, "output")
        return [("user", [question]), ("assistant", [answer])], {"instruction", "input", "output", "history"}
    if {"question", "answer"} <= record.keys():
        question, answer = (_text(record[name], key, name) for name in ("question", "answer"))
        return [("user", [question]), ("assistant", [answer])], {"question", "answer"}
    caption = next((name for name in ("caption", "text") if name in record), None)
    if caption == "text" and "question_id" in record:
        raise SampleError(key, "no_answer", "question_id with text is a file of questions; join it with its answers")
    if caption and [(name, len(refs)) for name, refs in listed.items()] == [("image", 1)]:
        return [("user", [Slot("image")]), ("assistant", [_text(record[caption], key, caption)])], {caption}
    raise _bad(key, f"no known shape: keys {sorted(map(str, record))}; accepted are {ACCEPTED_SHAPES}")


def _read_turn(turn: Mapping[str, Any], key: str) -> Turn:
    """Returns the role and the parts of one turn."""
    is_sharegpt = "from" in turn
    role, content = turn.get("from" if is_sharegpt else "role"), turn.get("value" if is_sharegpt else "content")
    if not isinstance(role, str) or role not in ROLES:
        raise _bad(key, f"role {role!r} in a turn with keys {sorted(map(str, turn))}; known are {', '.join(ROLES)}")
    if isinstance(content, list):
        return ROLES[role], [_read_part(part, key) for part in _objects(content, key, "content")]
    return ROLES[role], [_text(content, key, f"{role} turn")]


def _read_part(part: Mapping[str, Any], key: str) -> Part:
    """Returns one entry of a typed content list."""
    kind = part.get("type")
    if kind == "text":
        return _text(part.get("text", part.get("value")), key, "text part")
    if kind == "media":
        index = part.get("index")
        if type(index) is not int or index < 0:
            raise _bad(key, f"media part with index {index!r}; it counts through the record's media from 0")
        return Slot("media", index + 1)
    if kind not in ("image", "image_url", "video", "video_url"):
        raise _bad(key, f"content type {kind!r}; known are text, image, image_url, video, video_url, media")
    name: MediaKind = "image" if kind.startswith("image") else "video"
    value = next((part[field] for field in (name, f"{name}_url", "value", "url", "path") if field in part), None)
    if value is None:
        return Slot(name)  # the next one of the list beside the conversation
    return MediaRef(name, _text(value.get("url") if isinstance(value, Mapping) else value, key, f"{kind} part"))


def _check_turns(turns: Sequence[Turn], key: str) -> None:
    """Raises SampleError unless the turns are [system,] user, assistant, user, assistant, ... and answer something."""
    roles = [role for role, _ in turns]
    answers = [part for role, content in turns for part in content if role == "assistant"]
    if not any(not isinstance(part, str) or part.strip() for part in answers):
        raise SampleError(key, "no_answer", f"no answer with any text; the turns are {roles}")
    offset = int(roles[0] == "system")
    for position, role in enumerate(roles[offset:]):
        if role != ("assistant" if position % 2 else "user"):
            remedy = "users and assistants alternate, the user first; correct or split the conversation"
            raise _bad(key, f"turn {position + offset} is of the {role} in {roles}; {remedy}")
    if roles[-1] != "assistant":
        raise _bad(key, f"the last of {len(roles)} turns has no answer; take it out of the annotation")


def _parse_caption(members: Mapping[str, bytes], record: dict, media: Sequence[MediaRef], key: str) -> Record:
    """Returns the caption pair that a sample without a conversation is."""
    if len(media) != 1 or media[0].kind != "image" or not ("txt" in members or {"caption", "text"} & record.keys()):
        found = f"members {sorted(members)}, json keys {sorted(record)}"
        raise _bad(key, f"{found}: neither one image with a txt, nor json with {ACCEPTED_SHAPES}")
    if "txt" not in members:
        rest = {name: value for name, value in record.items() if name not in {*MEDIA_KEYS, "data", "media"}}
        return _parse({**rest, "image": media[0].ref}, key, {})
    try:
        caption = members["txt"].decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise _bad(key, f"txt is not UTF-8: {error}") from error
    meta = {name: value for name, value in record.items() if value != caption}
    return _parse({"caption": caption, "image": media[0].ref, "meta": meta}, key, {})


def _find_member(
    ref: MediaRef, refs: Sequence[MediaRef], members: Mapping[str, bytes], media: Sequence[MediaRef], key: str
) -> MediaRef:
    """Returns `ref` with the member that it means among the `members`, of which `media` are images and videos."""
    if ref.ref in members:
        return ref
    file_stem, _, file_extension = PurePosixPath(ref.ref).name.lower().partition(".")
    is_own_file = file_stem == PurePosixPath(key).name.lower()
    for name in (ref.ref.lower(), *([file_extension] if is_own_file else [])):
        if name in members:
            return MediaRef(ref.kind, name)
    alike = [other for other in media if other.kind == ref.kind]
    if len(alike) == 1 and sum(other.kind == ref.kind for other in refs) == 1:
        return alike[0]
    raise SampleError(key, "missing_media", f"{ref.kind} {ref.ref!r} is not among the members {sorted(members)}")


def _load_object(data: bytes, key: str) -> dict[str, Any]:
    """Returns the JSON object in `data`."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _bad(key, f"json cannot be parsed: {error}") from error
    if not isinstance(record, dict):
        raise _bad(key, f"json is a {type(record).__name__}; a record is an object")
    return record


def _objects(value: Any, key: str, name: str) -> list[Mapping[str, Any]]:
    """Returns `value` if it is a list of JSON objects."""
    if not isinstance(value, list) or not all(isinstance(item, (dict, Mapping)) for item in value):  # dict is quicker
        raise _bad(key, f"{name} is {repr(value)[:80]}; it must be a list of objects")
    return value


def _text(value: Any, key: str, name: str) -> str:
    """Returns `value` if it is a string."""
    if not isinstance(value, str):
        raise _bad(key, f"{name} is {repr(value)[:80]}; it must be a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON lets halves of surrogate pairs through; no tokenizer does
        raise _bad(key, f"{name} is no valid Unicode: {error}") from error
    return value


def _bad(key: str, detail: str) -> SampleError:
    return SampleError(key, "bad_record", detail)
