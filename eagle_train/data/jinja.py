"""A chat template as Jinja, for programs that serve an exported model."""

from __future__ import annotations

import json
from string import Formatter

from eagle_train.data.chat import ChatTemplate

IMAGES = "['image', 'image_url']"
"""Types of parts that are images, in Jinja."""


def to_jinja(template: ChatTemplate, placeholder: str) -> str:
    """Returns the `chat_template.jinja` that gives the text of `template`, before images are expanded.

    A message's content is a string, or a list of parts of type text and image, as the OpenAI interface has them.
    Names of special tokens in a text are not marked as text: a Jinja template has no way to.

    Args:
        placeholder: what stands for an image's tokens and its prefix and suffix; the program's processor knows it.

    Raises:
        ValueError: if the template moves or drops parts of a turn.
    """
    if template.media_first or not template.keep_user_text:
        raise ValueError("a template with media_first or without keep_user_text cannot be written as Jinja")
    lines = [
        "{%- set images = namespace(total=0, seen=0) -%}",
        "{%- for message in messages if message['content'] is not string -%}",
        f"{{%- for part in message['content'] if part['type'] in {IMAGES} -%}}",
        "{%- set images.total = images.total + 1 -%}{%- endfor -%}{%- endfor -%}",
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
        *turn(template, placeholder),
        "{{- suffix[message['role']] -}}" + literal(template.separator),
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{- prefix['assistant'] -}}{%- endif -%}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def turn(template: ChatTemplate, placeholder: str) -> list[str]:
    """Returns the Jinja that writes the `parts` of a turn."""
    after = literal(template.after_media or "")
    follows = f"{{%- if after.image -%}}{after}{{%- endif -%}}" if after else ""
    strip, first_newline = "", ""
    if template.strip:
        strip = "{%- set text = text.lstrip() if loop.first else text -%}"
        strip += "{%- set text = text.rstrip() if loop.last else text -%}"
    if template.after_media is not None:
        first_newline = "{%- set text = text[1:] if after.image and text.startswith('\\n') else text -%}"
    return [
        "{%- set after = namespace(image=false) -%}",
        "{%- for part in parts -%}",
        "{%- if part['type'] == 'text' -%}{%- set text = part['text'] -%}",
        strip,
        "{%- if " + ("text" if template.strip else "true") + " -%}" + follows + first_newline,
        "{{- text -}}{%- set after.image = false -%}{%- endif -%}",
        f"{{%- elif part['type'] in {IMAGES} -%}}",
        follows + "{%- set images.seen = images.seen + 1 -%}{%- set after.image = true -%}",
        "{%- if images.total == 1 -%}" + label(template.media.image) + "{%- else -%}",
        label(template.media.images) + "{%- endif -%}" + literal(placeholder),
        "{%- else -%}{{- raise_exception('this template has no place for a part of type ' ~ part['type']) -}}",
        "{%- endif -%}{%- endfor -%}",
        "" if template.strip else follows,
    ]


def quoted(value: str | dict[str, str]) -> str:
    """Returns a text, or texts by name, as Jinja literals: those of JSON."""
    return json.dumps(value, ensure_ascii=False)


def literal(text: str) -> str:
    """Returns the Jinja that writes a text."""
    return f"{{{{- {quoted(text)} -}}}}" if text else ""


def label(text: str) -> str:
    """Returns the Jinja that writes a label with the image's number."""
    pieces = Formatter().parse(text)  # (text, name of the field behind it or None, ...)
    return "".join(literal(before) + ("{{- images.seen -}}" if name else "") for before, name, _, _ in pieces)
