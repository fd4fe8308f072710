"""Annotations of other projects, recognised by their keys, become one form: the canonical record.

    {"messages": [{"role": "user", "content": [{"type": "media", "index": 0}, {"type": "text", "text": "Why?"}]}, ...],
     "media": [{"kind": "image", "member": "0.png", "max_pixels": 50176},
               {"kind": "video", "member": "1.mp4", "start": 3.0, "end": 9.5, "fps": 1.0},
               {"kind": "video", "members": ["2.0.jpg", "2.1.jpg"], "fps": 2.0},
               {"kind": "document", "members": ["3.0.png", "3.1.png"]}],
     "meta": {...}}

Every medium is placed exactly once and `media` is in reading order, so what is decoded in that order lands where
the conversation has it. Without `start` and `end` a video is its whole file; `fps` is the rate of frames that are
given as images, 1 by default, and of a file the rate that frames are to be taken at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from eagle_train.data.json_fields import bad_record, load_object, objects, text
from eagle_train.data.media_fields import (
    MEDIA_LISTS,
    PIXEL_FIELDS,
    VIDEO_FIELDS,
    listed_media,
    medium_fields,
    read_medium,
)
from eagle_train.data.media_members import find_members
from eagle_train.data.placeholders import (
    Listed,
    MediaRef,
    Part,
    Slot,
    Turn,
    file_suffix,
    fill_slots,
    media_kind,
    place_listed,
)
from eagle_train.types import MediaKind, Message, Role, SampleError

ACCEPTED_SHAPES = (
    "messages or conversations (role/content or from/value), instruction+output, question+answer, "
    "caption or text with one image"
)
ROLES: Mapping[str, Role] = {
    "system": "system", "human": "user", "user": "user", "observation": "user", "gpt": "assistant",
    "assistant": "assistant",
}  # fmt: skip
PART_KINDS: Mapping[str, MediaKind] = {
    "image": "image", "image_url": "image", "video": "video", "video_url": "video", "document": "document",
}  # fmt: skip
ONE_TURN = (frozenset({"instruction", "output"}), frozenset({"question", "answer"}))


@dataclass(frozen=True, slots=True)
class Record:
    """One annotation; the ints in `messages` count through `media` in reading order."""

    messages: tuple[Message, ...]
    media: tuple[MediaRef, ...]
    meta: dict[str, Any]


def parse_record(record: Mapping[str, Any], *, key: str) -> Record:
    """Returns the conversation of an annotation in any of the accepted shapes.

    Placeholders (`<image>`, `<video>`, `<document>`, or numbered: `<image-2>`) give way to the media; the text around
    them is kept as it is. Media without any placeholder go to the front of the first user turn, each followed by a
    newline. In a record without media, and beside typed content, a literal `<image>` is text.

    Args:
        record: canonical, LLaVA, ShareGPT, typed content (OpenAI, Qwen, LLaMA-Factory), Eagle 2.5, alpaca,
            question/answer, or a caption; what is not part of the conversation becomes `meta`.
        key: names the sample in errors.

    Raises:
        SampleError: `placeholder_mismatch` with both numbers, `no_answer`, or `bad_record` for anything else, such
            as an unknown role, turns that do not alternate from user to assistant, or text that is no string.
    """
    return _parse(record, key, {})


def nowhere(path: str) -> bool:
    """Returns False: a record's media are members of its sample."""
    del path
    return False


def anywhere(path: str) -> bool:
    """Returns True: what no member stands for is kept, as whoever made the index has looked at it."""
    del path
    return True


def parse_members(members: Mapping[str, bytes], *, key: str, elsewhere: Callable[[str], bool] = nowhere) -> Record:
    """Returns the conversation of a WebDataset sample; every `ref` of it is a member, or may be `elsewhere`.

    The `json` member is a record as `parse_record` takes it. A reference in it finds the member of that extension,
    the one of that file name (`<key>.jpg`), or the only one of its kind; if it names no media, the media members
    are its media. Without a conversation the sample is a caption pair: one image, and `txt` or the json's `caption`.
    Without any media member, whatever is a record is one.

    Args:
        members: contents by extension (`json`, `0.png`); contents of media are not looked at.
        key: tar key of the sample.
        elsewhere: whether a path or address in the record that no member stands for is kept, to be read there.

    Raises:
        SampleError: as `parse_record`, and `missing_media` for a reference without a member.
    """
    record = load_object(members["json"], key) if "json" in members else {}
    media = [MediaRef(kind, name) for name in members if (kind := media_kind(name))]
    if not _has_conversation(record) and (media or not record):
        return _parse_caption(members, record, media, key)
    present: Listed = {}
    for ref in media:
        present.setdefault(ref.kind, []).append(ref)
    parsed = _parse(record, key, present)
    found = tuple(find_members(ref, parsed.media, members, media, key, elsewhere) for ref in parsed.media)
    return Record(parsed.messages, found, parsed.meta)


def to_canonical(record: Record, members: Sequence[str]) -> dict[str, Any]:
    """Returns the canonical json of a record whose files (`MediaRef.paths`, in order) are stored as `members`."""
    if len(members) != (files := sum(len(ref.paths) for ref in record.media)):
        raise ValueError(f"{len(members)} members for the {files} files of a record; each needs one")
    rest = iter(members)
    media = [medium_fields(ref, list(islice(rest, len(ref.paths)))) for ref in record.media]
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


def stored_names(media: Sequence[MediaRef]) -> list[str]:
    """Returns the members that the files of a record are stored as: `0.jpg`, or `1.0.jpg`, `1.1.jpg` for a list."""
    names = []
    for i, ref in enumerate(media):
        for k, file in enumerate(ref.files):
            suffix = file_suffix(file.ref) if media_kind(file.ref) else file.kind
            names.append(f"{i}.{k}.{suffix}" if ref.refs else f"{i}.{suffix}")
    return names


def _parse(record: Mapping[str, Any], key: str, present: Listed) -> Record:
    """Returns the parsed record; `present` are the media of a record that names none itself."""
    if not isinstance(record, Mapping):
        raise bad_record(key, f"a record is a JSON object, not {type(record).__name__}")
    listed, used = listed_media(record, key)
    turns, fields = _read_turns(record, listed, key)
    used |= fields | {"meta"}
    if "system" in record:
        used.add("system")
        turns = [("system", [text(record["system"], key, "system")]), *turns] if record["system"] else turns
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


def _has_conversation(record: Mapping[str, Any]) -> bool:
    """Returns whether a json member holds turns, not only a caption or nothing of use."""
    return "messages" in record or "conversations" in record or any(record.keys() >= keys for keys in ONE_TURN)


def _read_turns(record: Mapping[str, Any], listed: Listed, key: str) -> tuple[list[Turn], set[str]]:
    """Returns the turns of a record, and the keys they were read from."""
    for name in ("messages", "conversations"):
        if name in record:
            return [_read_turn(turn, key) for turn in objects(record[name], key, name)], {name}
    if {"instruction", "output"} <= record.keys():
        if record.get("history"):
            raise bad_record(key, "history holds earlier turns; write the whole conversation as messages")
        question = text(record["instruction"], key, "instruction")
        if extra := record.get("input"):
            question += f"\n{text(extra, key, 'input')}"
        answer = text(record["output"], key, "output")
        return [("user", [question]), ("assistant", [answer])], {"instruction", "input", "output", "history"}
    if {"question", "answer"} <= record.keys():
        question, answer = (text(record[name], key, name) for name in ("question", "answer"))
        return [("user", [question]), ("assistant", [answer])], {"question", "answer"}
    caption = next((name for name in ("caption", "text") if name in record), None)
    if caption == "text" and "question_id" in record:
        raise SampleError(key, "no_answer", "question_id with text is a file of questions; join it with its answers")
    if caption and [(name, len(refs)) for name, refs in listed.items()] == [("image", 1)]:
        return [("user", [Slot("image")]), ("assistant", [text(record[caption], key, caption)])], {caption}
    raise bad_record(key, f"no known shape: keys {sorted(map(str, record))}; accepted are {ACCEPTED_SHAPES}")


def _read_turn(turn: Mapping[str, Any], key: str) -> Turn:
    """Returns the role and the parts of one turn."""
    is_sharegpt = "from" in turn
    role, content = turn.get("from" if is_sharegpt else "role"), turn.get("value" if is_sharegpt else "content")
    if not isinstance(role, str) or role not in ROLES:
        raise bad_record(
            key, f"role {role!r} in a turn with keys {sorted(map(str, turn))}; known are {', '.join(ROLES)}"
        )
    if isinstance(content, list):
        return ROLES[role], [_read_part(part, key) for part in objects(content, key, "content")]
    return ROLES[role], [text(content, key, f"{role} turn")]


def _read_part(part: Mapping[str, Any], key: str) -> Part:
    """Returns one entry of a typed content list."""
    kind = part.get("type")
    if kind == "text":
        return text(part.get("text", part.get("value")), key, "text part")
    if kind == "media":
        index = part.get("index")
        if type(index) is not int or index < 0:
            raise bad_record(key, f"media part with index {index!r}; it counts through the record's media from 0")
        return Slot("media", index + 1)
    if kind not in PART_KINDS:
        raise bad_record(key, f"content type {kind!r}; known are text, media, {', '.join(PART_KINDS)}")
    name = PART_KINDS[kind]
    value = next((part[field] for field in (name, f"{name}_url", "value", "url", "path") if field in part), None)
    if value is None:
        return Slot(name)  # the next one of the list beside the conversation
    if isinstance(value, Mapping) and "url" in value:
        value = value["url"]  # OpenAI's may also tell a level of detail
    asked = (*PIXEL_FIELDS, *(VIDEO_FIELDS if name == "video" else ()))
    given = {field: part[field] for field in asked if part.get(field) is not None}
    if given:
        value = (dict(value) if isinstance(value, Mapping) else {"path": value}) | given
    return read_medium(value, name, key, f"{kind} part")


def parse_prompt(messages: Sequence[Mapping[str, Any]], *, key: str) -> Record:
    """Returns a conversation that ends with a user turn: a question.

    Args:
        messages: turns as in a record's `messages`.
        key: names the question in errors.

    Raises:
        SampleError: as `parse_record`.
    """
    record = parse_record({"messages": [*messages, {"role": "assistant", "content": "?"}]}, key=key)
    return Record(record.messages[:-1], record.media, record.meta)


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
            raise bad_record(key, f"turn {position + offset} is of the {role} in {roles}; {remedy}")
    if roles[-1] != "assistant":
        raise bad_record(key, f"the last of {len(roles)} turns has no answer; take it out of the annotation")


def _parse_caption(members: Mapping[str, bytes], record: dict, media: Sequence[MediaRef], key: str) -> Record:
    """Returns the caption pair that a sample without a conversation is."""
    if len(media) != 1 or media[0].kind != "image" or not ("txt" in members or {"caption", "text"} & record.keys()):
        found = f"members {sorted(members)}, json keys {sorted(record)}"
        raise bad_record(key, f"{found}: neither one image with a txt, nor json with {ACCEPTED_SHAPES}")
    if "txt" not in members:
        rest = {name: value for name, value in record.items() if name not in MEDIA_LISTS}
        return _parse({**rest, "image": media[0].ref}, key, {})
    try:
        caption = members["txt"].decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise bad_record(key, f"txt is not UTF-8: {error}") from error
    meta = {name: value for name, value in record.items() if value != caption}
    return _parse({"caption": caption, "image": media[0].ref, "meta": meta}, key, {})
