"""`python -m eagle_train chat RUN_OR_EXPORT ["question"] [--image FILE] [--messages FILE]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import TextStreamer

from eagle_train.data.chat import TextRun
from eagle_train.data.encode import Encoder
from eagle_train.data.media_fields import SIZE_FIELDS
from eagle_train.data.media_input import chosen_content, load_medium
from eagle_train.data.placeholders import MediaRef
from eagle_train.data.schemas import parse_prompt
from eagle_train.model.generate import Prompt, generate
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.evaluate import make_prompt
from eagle_train.train.load import load_model
from eagle_train.types import Media, MediaPlan, Message, SampleError

KEY = "question"
"""Names what is asked in errors."""


def main(arguments: list[str]) -> int:
    """Answers one question, or several turns read from the terminal; returns the exit code."""
    options = parse(arguments)
    messages, refs = opening(options)
    media, files = read_media(refs)
    model, encoder = load_model(options.model)
    if not encoder.tiling.tile_depth and any(name in SIZE_FIELDS for ref in refs for name, _ in ref.limits):
        print("note: sizes in pixels that messages ask for are not used: this model cuts tiles", file=sys.stderr)
    room = (options.max_length or model.llm.config.max_position_embeddings) - options.max_new_tokens
    plans = tiles = None
    for question in questions(options):
        if question is not None:
            first = () if messages else tuple(part for place in range(len(media)) for part in (place, "\n"))
            messages.append(Message(role="user", content=(*first, question)))
        if tiles is None:
            plans = plan(encoder, messages, media, room)
            tiles = encoder.new_tiles(plans)
            chosen = [chosen_content(*each) for each in zip(media, plans, files, strict=True)]
            encoder.decode_all(KEY, media, plans, chosen, tiles)
        prompt = make_prompt(encoder, messages, media, plans, tiles)
        answer = reply(model, encoder, prompt, options.max_new_tokens)
        messages.append(Message(role="assistant", content=(answer,)))
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Returns the options of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train chat",
        description="Asks a trained model about images, videos and documents; without a question, a conversation. "
        "Media are files, file:// or http(s):// addresses, or data:...;base64,...",
    )
    parser.add_argument("model", type=Path, help="run folder or export")
    parser.add_argument("question", nargs="?", help="without it, questions are read until an empty line")
    parser.add_argument("--image", action="append", default=[], help="may be given several times")
    parser.add_argument("--video", action="append", default=[], help="a file")
    parser.add_argument("--frames", nargs="+", action="append", default=[], help="a video as its frames: images")
    parser.add_argument("--fps", type=float, help="rate of --frames; default: 1")
    parser.add_argument("--document", nargs="+", action="append", default=[], help="a document's pages: images")
    parser.add_argument(
        "--messages",
        help="JSON file (- is the standard input) with turns whose content is text or a list of entries of type text, "
        'image, video or document, as {"type": "image", "image": "a.png"}; the last turn is the user\'s',
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer; default: the model's")
    options = parser.parse_intermixed_args(arguments)
    given = options.image or options.video or options.frames or options.document or options.question
    if options.messages and given:
        parser.error("--messages holds the question and its media; give neither beside it")
    if options.fps is not None and not options.frames:
        parser.error("--fps is the rate of --frames; a video is looked at as the model's `degrade` says")
    return options


def opening(options: argparse.Namespace) -> tuple[list[Message], list[MediaRef]]:
    """Returns the turns that are given, and the media of the conversation, in reading order.

    Raises:
        SampleError: for messages that are no conversation.
    """
    if options.messages:
        text = sys.stdin.read() if options.messages == "-" else Path(options.messages).read_text()
        turns = json.loads(text)
        record = parse_prompt(turns["messages"] if isinstance(turns, dict) else turns, key=options.messages)
        return list(record.messages), list(record.media)
    refs = [MediaRef("image", path) for path in options.image]
    refs += [MediaRef("video", path) for path in options.video]
    refs += [MediaRef("video", refs=tuple(paths), fps=options.fps) for paths in options.frames]
    return [], refs + [MediaRef("document", refs=tuple(paths)) for paths in options.document]


def questions(options: argparse.Namespace):
    """Yields what is asked: None for messages that are given, the one question, or those typed at the terminal."""
    if options.messages:
        yield None
    elif options.question:
        yield options.question
    else:
        yield from ask()


def ask():
    """Yields questions typed at the terminal until an empty line or the end of input."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question


def read_media(refs: Sequence[MediaRef]) -> tuple[list[Media], list[list[bytes]]]:
    """Returns the header facts of media, and the bytes of each of their files.

    Raises:
        ValueError: for a file that is missing or unreadable.
    """
    try:
        loaded = [load_medium(ref, KEY) for ref in refs]
    except SampleError as error:
        raise ValueError(f"cannot read a medium: {error.detail}") from error
    return [media for media, _ in loaded], [files for _, files in loaded]


def plan(encoder: Encoder, messages: Sequence[Message], media: Sequence[Media], room: int) -> tuple[MediaPlan, ...]:
    """Returns the frames and tiles of the media of a first turn, as in training: within what its text leaves.

    Args:
        room: tokens of the prompt.

    Raises:
        ValueError: if they do not fit with the fewest frames and tiles.
    """
    items = encoder.template.encode_prompt(messages, encoder.tokenizer)
    text = sum(len(item.ids) for item in items if isinstance(item, TextRun))
    plans, tokens = encoder.plan_media(media, room - text)
    if text + tokens > room:
        raise ValueError(
            f"the prompt has {text + tokens} tokens with the fewest frames and tiles, and there is room for {room}; "
            f"give fewer files, or raise --max-length"
        )
    return plans


def reply(model: VisionLanguageModel, encoder: Encoder, prompt: Prompt, max_new_tokens: int) -> str:
    """Prints the answer to a prompt as it comes, and returns it."""
    ids = generate(
        model,
        [prompt],
        max_new_tokens=max_new_tokens,
        stop_ids=encoder.template.stop_ids(encoder.tokenizer),
        pad_id=encoder.image_id,
        streamer=TextStreamer(encoder.tokenizer, skip_special_tokens=True),
    )
    return encoder.tokenizer.decode(ids[0], skip_special_tokens=True).strip()
