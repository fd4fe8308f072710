"""A chat template as Jinja, for programs that serve an exported model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from string import Formatter

from eagle_train.data.chat import ChatTemplate
from eagle_train.data.media_text import ORDINALS, MediaText

IMAGES = "['image', 'image_url']"
VIDEOS = "['video', 'video_url']"
"""Types of parts, in Jinja."""
NEEDS_FRAMES = (
    "this template writes the frames of a video one by one: give them as a list of images "
    "(video: [...], with fps, 1 by default)"
)
COUNTED = {"image": IMAGES, "video": VIDEOS, "document": "['document']"}
"""Types of parts by the name of the counter of their kind."""
ORDINAL = f"({json.dumps(list(ORDINALS))}[number - 1] if number <= {len(ORDINALS)} else number)"
"""The number of a medium in words."""


def to_jinja(template: ChatTemplate, placeholder: str, *, video_placeholder: str | None = None) -> str:
    """Returns the `chat_template.jinja` that gives the text of `template`, before images are expanded.

    A message's content is a string, or a list of parts of type text, image, video and document, as the OpenAI interface
    and Qwen's have them. Frames of a video, and pages of a document, are a list of images; their labels are written as
    in training, one placeholder each.
    Names of special tokens in a text are not marked as text: a Jinja template has no way to.

    Args:
        placeholder: what stands for an image's tokens and its prefix and suffix; the program's processor knows it.
        video_placeholder: what stands for all of a video, where the program's processor writes the frames itself.

    Raises:
        ValueError: if the template moves or drops parts of a turn.
    """
    if template.media_first or not template.keep_user_text:
        raise ValueError("a template with media_first or without keep_user_text cannot be written as Jinja")
    lines = [
        "{%- set total = namespace(image=0, video=0, document=0) -%}",
        "{%- set seen = namespace(image=0, video=0, document=0) -%}",
        "{%- for message in messages if message['content'] is not string -%}",
        *(
            f"{{%- for part in message['content'] if part['type'] in {types} -%}}"
            f"{{%- set total.{kind} = total.{kind} + 1 -%}}{{%- endfor -%}}"
            for kind, types in COUNTED.items()
        ),
        "{%- endfor -%}",
        f"{{%- set prefix = {quoted(dict(template.prefix))} -%}}",
        f"{{%- set suffix = {quoted(dict(template.suffix))} -%}}",
        literal(template.start or ""),
    ]
    if template.system is not None:
        default = template.prefix["system"] + template.system + template.suffix["system"] + template.separator
        lines.append("{%- if messages[0]['role'] != 'system' -%}" + literal(default) + "{%- endif -%}")
    lines += [
        "{%- for message in messages -%}",
        "{{- prefix[message['role']] -}}",
        "{%- if message['role'] == 'assistant' -%}" + literal(template.answer_prefix) + "{%- endif -%}",
        "{%- set parts = [{'type': 'text', 'text': message['content']}] if message['content'] is string",
        " else message['content'] -%}",
        *turn(template, placeholder, video_placeholder),
        "{{- suffix[message['role']] -}}" + literal(template.separator),
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{- prefix['assistant'] -}}{%- endif -%}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def turn(template: ChatTemplate, placeholder: str, video_placeholder: str | None) -> list[str]:
    """Returns the Jinja that writes the `parts` of a turn."""
    after = literal(template.after_media or "")
    follows = f"{{%- if after.medium -%}}{after}{{%- endif -%}}" if after else ""
    strip, first_newline = "", ""
    if template.strip:
        strip = "{%- set text = text.lstrip() if loop.first else text -%}"
        strip += "{%- set text = text.rstrip() if loop.last else text -%}"
    if template.after_media is not None:
        first_newline = "{%- set text = text[1:] if after.medium and text.startswith('\\n') else text -%}"
    return [
        "{%- set after = namespace(medium=false) -%}",
        "{%- for part in parts -%}",
        "{%- if part['type'] == 'text' -%}{%- set text = part['text'] -%}",
        strip,
        "{%- if " + ("text" if template.strip else "true") + " -%}" + follows + first_newline,
        "{{- text -}}{%- set after.medium = false -%}{%- endif -%}",
        f"{{%- elif part['type'] in {IMAGES} -%}}" + begun("image", follows),
        "{%- if total.image == 1 -%}" + label(template.media.image) + "{%- else -%}",
        label(template.media.images) + "{%- endif -%}" + literal(placeholder),
        f"{{%- elif part['type'] in {VIDEOS} -%}}" + begun("video", follows),
        *([literal(video_placeholder)] if video_placeholder else video(template.media, placeholder)),
        "{%- elif part['type'] == 'document' -%}" + begun("document", follows),
        *document(template.media, placeholder),
        "{%- else -%}{{- raise_exception('this template has no place for a part of type ' ~ part['type']) -}}",
        "{%- endif -%}{%- endfor -%}",
        "" if template.strip else follows,
    ]


def begun(kind: str, follows: str) -> str:
    """Returns the Jinja before every medium: what follows the one before it, and its number among those of its kind."""
    counted = f"{{%- set seen.{kind} = seen.{kind} + 1 -%}}{{%- set number = seen.{kind} -%}}"
    return f"{follows}{counted}{{%- set after.medium = true -%}}"


def video(strings: MediaText, placeholder: str) -> list[str]:
    """Returns the Jinja that writes a video whose frames are given as images."""
    times = {"seconds": "loop.index0 / fps", "number": "loop.index"}
    return [
        "{%- set frames = part['frames'] or part['video'] -%}",
        "{%- if not frames or frames is string or frames is mapping or frames is not iterable -%}",
        f"{{{{- raise_exception({quoted(NEEDS_FRAMES)}) -}}}}",
        "{%- endif -%}",
        "{%- set fps = part['fps'] or 1.0 -%}{%- set duration = (frames | length) / fps -%}",
        label(strings.video),
        "{%- for frame in frames -%}",
        separated(strings) + label(strings.frame, times) + literal(placeholder),
        "{%- endfor -%}",
    ]


def document(strings: MediaText, placeholder: str) -> list[str]:
    """Returns the Jinja that writes a document, whose pages are images."""
    return [
        "{%- set leaves = part['pages'] or part['document'] -%}{%- set pages = leaves | length -%}",
        label(strings.document),
        "{%- for leaf in leaves -%}",
        separated(strings) + label(strings.page, {"number": "loop.index"}) + literal(placeholder),
        "{%- endfor -%}",
    ]


def separated(strings: MediaText) -> str:
    """Returns the Jinja that writes the separator before every frame or page but the first."""
    return f"{{%- if not loop.first -%}}{literal(strings.separator)}{{%- endif -%}}" if strings.separator else ""


def quoted(value: str | dict[str, str]) -> str:
    """Returns a text, or texts by name, as Jinja literals: those of JSON."""
    return json.dumps(value, ensure_ascii=False)


def literal(text: str) -> str:
    """Returns the Jinja that writes a text."""
    return f"{{{{- {quoted(text)} -}}}}" if text else ""


def label(text: str, expressions: Mapping[str, str] | None = None) -> str:
    """Returns the Jinja that writes a format string of `MediaText`.

    Args:
        expressions: Jinja of the fields that are not variables of their names.
    """
    known = {"ordinal": ORDINAL} | dict(expressions or {})
    written = ""
    for before, name, form, _ in Formatter().parse(text):  # text, and the field behind it, if any
        value = known.get(name, name)
        shown = f"{quoted(f'%{form}')} | format({value})" if form else value
        written += literal(before) + (f"{{{{- {shown} -}}}}" if name else "")
    return written
