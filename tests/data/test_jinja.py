"""A template as Jinja gives the text that the template gives, whatever the text holds."""

from dataclasses import replace

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from eagle_train.data.chat import ChatTemplate
from eagle_train.data.jinja import to_jinja
from eagle_train.data.media_text import MediaText, medium_texts, places
from eagle_train.types import Media, Message

CHATML = ChatTemplate(
    prefix={role: f"<|im_start|>{role}\n" for role in ("system", "user", "assistant")},
    suffix=dict.fromkeys(("system", "user", "assistant"), "<|im_end|>"),
    separator="\n",
    system='Say "no" to {{ braces }} and \\ é 🦅.',
)
PLAIN = ChatTemplate(
    start="<s>",
    prefix={"system": "", "user": "USER: ", "assistant": "ASSISTANT:"},
    suffix={"system": " ", "user": " ", "assistant": "</s>"},
    answer_prefix=" ",
)
TURNS = [
    Message(role="user", content=('{% if x %}"quoted"\n  {{ y }}',)),
    Message(role="assistant", content=("Yes.\n",)),
    Message(role="user", content=("And now? ",)),
]


def raise_exception(message):
    raise ValueError(message)


def rendered(template, messages, **more):
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = raise_exception
    text = to_jinja(template, "<image>")
    return environment.from_string(text).render(messages=messages, **more)


def plain(template, messages):
    """Returns the text of messages without media."""
    return (template.start or "") + "".join(text for item in template.render(messages) for text, _ in item)


@pytest.mark.parametrize("template", [CHATML, PLAIN])
@pytest.mark.parametrize("system", [None, "Own."])
def test_text_is_that_of_the_template(template, system):
    messages = [*([Message(role="system", content=(system,))] if system else []), *TURNS]
    strings = [{"role": m.role, "content": m.content[0]} for m in messages]
    parts = [{"role": m.role, "content": [{"type": "text", "text": m.content[0]}]} for m in messages]
    expected = plain(template, messages)
    assert rendered(template, strings) == rendered(template, parts) == expected
    asked = rendered(template, strings, add_generation_prompt=True)
    assert asked == expected + template.prefix["assistant"]


def image_turn(*parts):
    found = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": found}


def test_images_are_labelled_when_there_are_several_and_count_through_all_turns():
    template = replace(PLAIN, media=MediaText(images="<image {number}>"))
    assert rendered(template, [image_turn(None, "What?")]) == "<s>USER: <image>What? "
    several = rendered(template, [image_turn(None, "a", None), image_turn("b", None)])
    assert several == "<s>USER: <image 1><image>a<image 2><image> USER: b<image 3><image> "
    always = replace(PLAIN, media=MediaText(image="{{<image {number}>}}"))
    assert rendered(always, [image_turn(None)]) == "<s>USER: {<image 1>}<image> "


@pytest.mark.parametrize("after_media", [None, "", "\n"])
@pytest.mark.parametrize("strip", [False, True])
@pytest.mark.parametrize(
    "parts",
    [
        (None, "\nWhat? "),
        (None, "What?"),
        (" \n", None, None, "\n\nboth? \n"),
        ("Before ", None),
        (None, " \n"),
        ("\nno image\n",),
    ],
)
def test_what_stands_around_media_is_that_of_the_template(after_media, strip, parts):
    template = replace(PLAIN, after_media=after_media, strip=strip)
    numbers = iter(range(9))
    message = Message(role="user", content=tuple(next(numbers) if part is None else part for part in parts))
    items = template.render([message])
    expected = "<s>" + "".join("<image>" if isinstance(i, int) else "".join(text for text, _ in i) for i in items)
    assert rendered(template, [image_turn(*parts)]) == expected


def test_a_part_without_a_place_is_an_error():
    with pytest.raises(ValueError, match="no place for a part of type audio"):
        rendered(PLAIN, [{"role": "user", "content": [{"type": "audio"}]}])


LABELS = {
    "card": MediaText(video="Video:\n", frame="Frame {number} sampled at {seconds:.2f} seconds: ", separator="\n"),
    "processor": MediaText(video="The {ordinal} video, {fps:.2f} fps: ", frame="Frame {number} at {seconds:.1f}s: "),
    "training": MediaText(video="{duration:.2f} seconds of {number}: ", frame="{number}", page="p. {number} "),
    "pages": MediaText(document="The {ordinal} of {pages} pages: ", page="Page {number}: ", separator="; "),
}


@pytest.mark.parametrize("strings", LABELS.values(), ids=LABELS)
def test_frames_and_pages_are_labelled_as_in_training(strings):
    template = replace(PLAIN, media=strings, after_media="\n")
    frames = [f"{i}.png" for i in range(11)]
    parts = [
        {"type": "video", "video": frames[:7], "fps": 2.0},
        {"type": "image"},
        {"type": "document", "document": frames[:2]},
        {"type": "video", "frames": frames},
        {"type": "text", "text": "Why?"},
        *[{"type": "video_url", "video": frames[:1], "fps": 0.3}] * 10,
    ]
    media = [Media(kind="video", members=frames[:7], num_frames=7, duration=3.5), Media(kind="image")]
    media += [Media(kind="document", members=frames[:2], num_frames=2)]
    media += [Media(kind="video", members=frames, num_frames=11, duration=11.0)]
    media += [Media(kind="video", members=frames[:1], num_frames=1, duration=1 / 0.3)] * 10
    texts = [
        "<image>".join(medium_texts(strings, medium, place, medium.num_frames))
        for medium, place in zip(media, places(media), strict=True)
    ]
    message = Message(role="user", content=(0, 1, 2, 3, "Why?", *range(4, 14)))
    items = template.render([message])
    expected = "<s>" + "".join(texts[i] if isinstance(i, int) else "".join(text for text, _ in i) for i in items)
    assert rendered(template, [{"role": "user", "content": parts}]) == expected


@pytest.mark.parametrize("part", [{"video": "clip.mp4"}, {"video": {"url": "clip.mp4"}}, {"video": []}, {}])
def test_a_video_whose_frames_are_not_given_is_an_error_that_says_so(part):
    with pytest.raises(ValueError, match="give them as a list of images"):
        rendered(PLAIN, [{"role": "user", "content": [{"type": "video"} | part]}])


def test_a_processor_that_writes_the_frames_itself_gets_its_own_placeholder():
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    text = to_jinja(replace(PLAIN, after_media="\n"), "<image>", video_placeholder="<video>")
    parts = [{"type": "video", "url": "clip.mp4"}, {"type": "image"}, {"type": "text", "text": "Why?"}]
    found = environment.from_string(text).render(messages=[{"role": "user", "content": parts}])
    assert found == "<s>USER: <video>\n<image>\nWhy? "


@pytest.mark.parametrize("change", [{"media_first": True}, {"keep_user_text": False}])
def test_templates_that_move_or_drop_parts_are_refused(change):
    template = ChatTemplate(prefix=PLAIN.prefix, suffix=PLAIN.suffix, **change)
    with pytest.raises(ValueError, match="cannot be written as Jinja"):
        to_jinja(template, "<image>")
