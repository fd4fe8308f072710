"""`chat` takes images, videos, lists of frames, documents and messages, and asks as training does."""

import base64
import io
import json

import pytest
from PIL import Image

from eagle_train.__main__ import main
from eagle_train.tools import chat
from eagle_train.train.load import load_model
from eagle_train.train.released_internvl import import_config, import_released
from tests.data.range_server import serving
from tests.data.test_videos import video
from tests.eagle1_layout import random_weights
from tests.internvl_layout import TINY_LLM, original_config, original_shapes, write_original


@pytest.fixture(scope="module")
def model(data, tmp_path_factory):
    """An imported tiny InternVL2; no test changes it."""
    folder = tmp_path_factory.mktemp("chat")
    original = write_original(
        folder / "original", original_config(TINY_LLM), random_weights(original_shapes(TINY_LLM)), data
    )
    import_released(original, folder / "ours", import_config(original))
    return folder / "ours"


@pytest.fixture
def asked(model, monkeypatch):
    """Asks on the command line; gives the text of each prompt and its tiles."""
    _, encoder = load_model(model)
    prompts = []

    def reply(model, encoder, prompt, max_new_tokens):
        prompts.append(prompt)
        return "So."

    monkeypatch.setattr(chat, "reply", reply)

    def ask(*arguments):
        prompts.clear()
        assert main(["chat", str(model), *map(str, arguments)]) == 0
        texts = [encoder.tokenizer.decode(prompt.input_ids) for prompt in prompts]
        return [(text.replace("<IMG_CONTEXT>", "."), len(p.pixels)) for text, p in zip(texts, prompts, strict=True)]

    return ask


@pytest.fixture
def files(tmp_path):
    """Small pictures: one tile each."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (24, 24), (80 * i, 0, 0)).save(path)
    return paths


TILE = "<img>....</img>"


def user(text):
    return f"<|im_start|>user\n{text}<|im_end|><|im_start|>assistant\n"


def test_a_document_and_lists_of_frames_are_one_medium_each(asked, files):
    ((text, tiles),) = asked("What is it?", "--document", *files[:2], "--image", files[2])
    assert text.endswith(user(f"{TILE}\nPage-1: {TILE}\nPage-2: {TILE}\nWhat is it?")) and tiles == 3
    ((text, tiles),) = asked("What?", "--frames", *files, "--fps", "2", "--frames", files[0])
    frames = "\n".join(f"Frame{i}: {TILE}" for i in (1, 2, 3))
    assert text.endswith(user(f"{frames}\nFrame1: {TILE}\nWhat?")) and tiles == 4


def test_messages_hold_media_in_every_form(asked, files, tmp_path, capsys):
    (tmp_path / "clip.mp4").write_bytes(video(30))  # 10 frames per second
    with serving() as server:
        server.files["a.png"] = files[1].read_bytes()
        data = base64.b64encode(files[2].read_bytes()).decode()
        content = [
            {"type": "image", "image": f"file://{files[0]}", "max_pixels": 3136},
            {"type": "image_url", "image_url": {"url": server.url("a.png")}},
            {"type": "text", "text": "and"},
            {"type": "image", "image": f"data:image;base64,{data}"},
            {"type": "video", "video": str(tmp_path / "clip.mp4"), "video_start": 1.0, "video_end": 2.0, "fps": 1},
            {"type": "text", "text": "Same?"},
        ]
        first = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
        (tmp_path / "m.json").write_text(json.dumps([*first, {"role": "user", "content": content}]))
        ((text, tiles),) = asked("--messages", tmp_path / "m.json")
    frames = "\n".join(f"Frame{i}: {TILE}" for i in range(1, 9))  # 8 at least
    images = f"Image-1: {TILE}\nImage-2: {TILE}\nandImage-3: {TILE}\n"
    assert text.endswith("Yes?<|im_end|>" + user(f"{images}{frames}\nSame?")) and tiles == 11
    assert "not used: this model cuts tiles" in capsys.readouterr().err


def test_a_conversation_shows_its_media_once(asked, files, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("What?\nSure?\n\n"))
    (first, tiles), (second, again) = asked("--image", files[0])
    assert first.endswith(user(f"{TILE}\nWhat?")) and tiles == again == 1
    assert second.endswith(f"{TILE}\nWhat?<|im_end|><|im_start|>assistant\nSo.<|im_end|>" + user("Sure?"))


def test_messages_may_come_from_the_standard_input(asked, monkeypatch):
    turns = {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(turns)))
    ((text, tiles),) = asked("--messages", "-")
    assert text == "<|im_start|>system\nBe brief.<|im_end|>" + user("Why?") and tiles == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["Why?", "--image", "absent.png"], "'absent.png' is no file"),
        (["Why?", "--image", "http://127.0.0.1:9/a.png"], "cannot be fetched"),
        (["Why?", "--document", __file__], "cannot read a medium"),
    ],
)
def test_what_cannot_be_read_ends_with_one_line(model, capsys, arguments, said):
    assert main(["chat", str(model), *arguments]) == 1
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_messages_stand_alone(model, capsys):
    with pytest.raises(SystemExit):
        main(["chat", str(model), "Why?", "--messages", "m.json"])
    assert "--messages holds the question" in capsys.readouterr().err


def test_a_rate_without_frames_is_refused(model, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["chat", str(model), "Why?", "--video", "v.mp4", "--fps", "3"])
    assert "--fps is the rate of --frames" in capsys.readouterr().err
