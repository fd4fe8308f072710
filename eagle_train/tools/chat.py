"""`python -m eagle_train chat RUN_OR_EXPORT [--image FILE] ["question"]`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import TextStreamer

from eagle_train.data.chat import TextRun
from eagle_train.data.encode import Encoder
from eagle_train.data.images import probe_image
from eagle_train.data.media import MediaError
from eagle_train.data.videos import probe_video
from eagle_train.model.generate import Prompt, generate
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.evaluate import make_prompt
from eagle_train.train.load import load_model
from eagle_train.types import Media, MediaPlan, Message


def main(arguments: list[str]) -> int:
    """Answers one question, or several turns read from the terminal; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m eagle_train chat",
        description="Asks a trained model about images and videos; without a question, a conversation.",
    )
    parser.add_argument("model", type=Path, help="run folder or export")
    parser.add_argument("question", nargs="?", help="without it, questions are read until an empty line")
    parser.add_argument("--image", type=Path, action="append", default=[], help="may be given several times")
    parser.add_argument("--video", type=Path, action="append", default=[])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--max-length", type=int, help="tokens of prompt and answer; default: the model's")
    options = parser.parse_intermixed_args(arguments)
    media, data = read_media(options.image, options.video)
    model, encoder = load_model(options.model)
    room = (options.max_length or model.llm.config.max_position_embeddings) - options.max_new_tokens
    messages: list[Message] = []
    for question in [options.question] if options.question else ask():
        first = not messages
        messages.append(Message(role="user", content=(*range(len(media) if first else 0), question)))
        if first:
            plans = plan(encoder, messages, media, room)
            tiles = encoder.new_tiles(plans)
            encoder.decode_all("question", media, plans, data, tiles)
        prompt = make_prompt(encoder, messages, media, plans, tiles)
        answer = reply(model, encoder, prompt, options.max_new_tokens)
        messages.append(Message(role="assistant", content=(answer,)))
    return 0


def ask():
    """Yields questions typed at the terminal until an empty line or the end of input."""
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question


def read_media(images: list[Path], videos: list[Path]) -> tuple[list[Media], list[bytes]]:
    """Returns the header facts and bytes of the given files.

    Raises:
        ValueError: for a file that is missing or unreadable.
    """
    media, data = [], []
    for path in [*images, *videos]:
        try:
            content = path.read_bytes()
            if path in images:
                width, height, orientation = probe_image(content)
                facts = {"width": width, "height": height, "orientation": orientation}
                media.append(Media(kind="image", member=path.name, **facts))
            else:
                media.append(Media(kind="video", member=path.name, **probe_video(content)._asdict()))
        except (OSError, MediaError) as error:
            raise ValueError(f"cannot read {path}: {error}") from error
        data.append(content)
    return media, data


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
