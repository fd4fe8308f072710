"""The chat template of an exported Eagle 2 gives the text that the formatter gives."""

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import (
    AutoTokenizer,
)

from eagle_train.data.media_text import medium_texts, places
from eagle_train.train.export_eagle2 import export_released
from eagle_train.train.load import load_model
from eagle_train.types import Media, Message
from tests.eagle1_layout import random_weights
from tests.eagle2_layout import (
    TINY_LLM,
    imported,
    new_config,
    old_config,
    released_shapes,
    write_release,
)

CHAT = [
    Message(role="user", content=("Look: ", 0, "\nWhat is it?")),
    Message(role="assistant", content=("A cat.",)),
    Message(role="user", content=(1, 'And "this"? {% a %} {{ b }}')),
]


@pytest.mark.parametrize("generation", [new_config, old_config])
@pytest.mark.parametrize("chat", [CHAT, CHAT[:1], [Message(role="system", content=("Be brief.",)), *CHAT]])
def test_the_chat_template_gives_the_text_that_the_formatter_gives(data, tmp_path, generation, chat):
    release = write_release(tmp_path / "r", generation(TINY_LLM), random_weights(released_shapes(TINY_LLM)), data)
    imported(release, tmp_path / "ours")
    export_released(tmp_path / "ours", tmp_path / "back")
    _, encoder = load_model(tmp_path / "ours")
    template, num_images = encoder.template, sum(isinstance(part, int) for m in chat for part in m.content)
    media = [Media(kind="image", member=f"{i}.png") for i in range(num_images)]
    images = [
        ("<IMG_CONTEXT>" * 8).join(medium_texts(template.media, medium, place, 1))  # two tiles of four tokens
        for medium, place in zip(media, places(media), strict=True)
    ]
    pieces = [images[i] if isinstance(i, int) else "".join(text for text, _ in i) for i in template.render(chat)]
    expected = "".join(pieces) + template.prefix["assistant"]
    assert expected.count("<IMG_CONTEXT>") == 8 * num_images > 0
    parts = [{"role": m.role, "content": [openai(part) for part in m.content]} for m in chat]
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as transformers and vLLM
    jinja = environment.from_string((tmp_path / "back/chat_template.jinja").read_text())
    rendered = jinja.render(messages=parts, add_generation_prompt=True)
    assert rendered.replace("<image>", "<img>" + "<IMG_CONTEXT>" * 8 + "</img>") == expected  # as vLLM expands it
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "back")
    assert tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True) == rendered


def openai(part):
    return {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}
