"""A chat template as Jinja, for programs that serve an exported model."""

from __future__ import annotations

import json

from eagle_train.data.chat import ChatTemplate

NUMBER = "{number}"


def to_jinja(template: ChatTemplate, *, image: str, images: str, placeholder: str) -> str:
    """Returns the `chat_template.jinja` that gives the text of `template`, before images are expanded.

    A message's content is a string, or a list of parts of type text and image, as the OpenAI interface has them.

    Args:
        image: text before the only image of a conversation.
        images: text before each of several, with `{number}`.
        placeholder: what stands for an image's tokens and the strings around them; the program's processor knows it.

    Raises:
        ValueError: if the template moves or drops parts of a turn.
    """
    if template.media_first or not template.keep_user_text:
        raise ValueError("a template with media_first or without keep_user_text cannot be written as Jinja")
    lines = [
        "{%- set images = namespace(total=0, seen=0) -%}",
        "{%- for message in messages if message['content'] is not string -%}",
        "{%- for part in message['content'] if part['type'] in ['image', 'image_url'] -%}",
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
        "{%- if message['content'] is string -%}{{- message['content'] -}}{%- else -%}",
        "{%- for part in message['content'] -%}",
        "{%- if part['type'] == 'text' -%}{{- part['text'] -}}",
        "{%- elif part['type'] in ['image', 'image_url'] -%}{%- set images.seen = images.seen + 1 -%}",
        "{%- if images.total == 1 -%}" + label(image) + "{%- else -%}" + label(images) + "{%- endif -%}",
        literal(placeholder),
        "{%- else -%}{{- raise_exception('this template has no place for a part of type ' ~ part['type']) -}}",
        "{%- endif -%}{%- endfor -%}{%- endif -%}",
        "{{- suffix[message['role']] -}}" + literal(template.separator),
        "{%- endfor -%}",
        "{%- if add_generation_prompt -%}{{- prefix['assistant'] -}}{%- endif -%}",
    ]
    return "\n".join(line for line in lines if line) + "\n"


def quoted(value: str | dict[str, str]) -> str:
    """Returns a text, or texts by name, as Jinja literals: those of JSON."""
    return json.dumps(value, ensure_ascii=False)


def literal(text: str) -> str:
    """Returns the Jinja that writes a text."""
    return f"{{{{- {quoted(text)} -}}}}" if text else ""


def label(text: str) -> str:
    """Returns the Jinja that writes a label with the image's number."""
    first, *others = text.split(NUMBER)
    return literal(first) + "".join("{{- images.seen -}}" + literal(other) for other in others)
