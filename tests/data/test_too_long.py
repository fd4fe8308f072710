"""Over-long samples: what is planned is what is encoded, whole turns stay, and what is lost is counted."""

import copy
import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from eagle_train.data.answers import AnswerEnd, first_answers
from eagle_train.data.catalog import Source
from eagle_train.data.degrade import EachByItself
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.lengths import ensure_lengths, read_lengths
from eagle_train.data.loader import RowDataset
from eagle_train.data.loss_weights import per_token
from eagle_train.data.shards import write_shards
from eagle_train.data.tables import read_table
from eagle_train.data.tiling import PadToSquare
from eagle_train.data.tokenizer.load import load_tokenizer
from eagle_train.data.too_long import DropTooLong, KeepTurns, Shortened
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.config import build, load_config
from eagle_train.train.stage_data import make_layout
from eagle_train.types import Media, MediaPlan, Message, Sample
from tests.catalogs import read_catalog
from tests.vocabularies import sentencepiece_bytes, sentencepiece_pieces, write_folder

WORDS = ("Two", "cats", " ", "\n", "été", "picture", "</s>", "12", "日", "  ", "the", "<image>")
TILE_TOKENS = 9


def png(seed: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), seed % 256, np.uint8)).save(out, "PNG")
    return out.getvalue()


def random_turns(rng: random.Random, num_answers: int) -> tuple[list[dict], int]:
    """Returns canonical turns with images anywhere in the user's, and the number of images."""
    turns, images = [], 0
    if rng.random() < 0.3:
        turns.append({"role": "system", "content": [{"type": "text", "text": "polite"}]})
    for _ in range(num_answers):
        content = []
        for _ in range(rng.randrange(1, 4)):
            if rng.random() < 0.4:
                content.append({"type": "media", "index": images})
                images += 1
            content.append({"type": "text", "text": text(rng, 6)})
        turns.append({"role": "user", "content": content})
        turns.append({"role": "assistant", "content": [{"type": "text", "text": "a" + text(rng, 12)}]})
    return turns, images


def text(rng: random.Random, longest: int) -> str:
    return "".join(rng.choice(WORDS) + rng.choice((" ", "")) for _ in range(rng.randrange(longest)))


def random_samples(count: int):
    rng = random.Random(1)
    for number in range(count):
        turns, images = random_turns(rng, rng.randrange(1, 6))
        media = [{"kind": "image", "member": f"{i}.png"} for i in range(images)]
        yield (
            f"{number:04d}",
            {"messages": turns, "media": media, "meta": {}},
            {f"{i}.png": png(i) for i in range(images)},
        )


@pytest.fixture
def tokenizer(tmp_path):
    folder = write_folder(tmp_path / "tokenizer", sentencepiece_bytes(sentencepiece_pieces()), legacy=False)
    return load_tokenizer(str(folder), tmp_path / "cache")


def make_encoder(tokenizer, template="vicuna_v1", **changes) -> Encoder:
    chosen = [f"chat_template={template}", *(f"+chat_template.{key}={value}" for key, value in changes.items())]
    return Encoder(
        template=build(load_config(["+experiment=toy", *chosen])["chat_template"]),
        tokenizer=tokenizer,
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=PadToSquare(),
        degrade=EachByItself(frames=FrameRate()),
        tile_size=8,
        tokens_per_tile=TILE_TOKENS,
        loss_weight=per_token,
    )


def read(encoder, shards, max_length, policy):
    return read_catalog([Source(name="s", shards=shards)], encoder, max_length, policy)


def lengths_of(found) -> np.ndarray:
    return np.concatenate([found.sizes(shard).num_tokens for shard in range(len(found.shards))])


def layouts_of(found) -> dict:
    """Returns the layouts of the usable samples, by number."""
    usable = np.flatnonzero(lengths_of(found)).tolist()
    places = {number: found.locate(number) for number in usable}
    return {number: found.sizes(shard).layout(row) for number, (shard, row) in places.items()}


def read_ends(shard, encoder) -> list[list[AnswerEnd]]:
    layout = make_layout(encoder, 100, DropTooLong())
    return read_lengths(read_table(ensure_lengths(shard, None, layout.text)))


@pytest.mark.parametrize("policy", [DropTooLong(), KeepTurns()], ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "chatml", "yi_chatml"])
def test_what_is_planned_is_what_is_encoded(tmp_path, tokenizer, template, policy):
    encoder = make_encoder(tokenizer, template)
    shards = write_shards(random_samples(60), tmp_path / "s", samples_per_shard=25)
    max_length = int(np.quantile(lengths_of(read(encoder, shards, 100_000, policy)), 0.12))
    found = read(encoder, shards, max_length, policy)
    dataset = RowDataset(found, encoder)
    good = layouts_of(found)
    for number, layout in good.items():
        sample = dataset.encode(number, layout, encoder.new_tiles(layout.media))
        assert len(sample.input_ids) == layout.num_tokens == lengths_of(found)[number] > 0
        assert len(sample.pixels) == layout.num_tiles
        assert (sample.loss_weights > 0).sum() == layout.num_targets > 0
    dataset.close()
    assert {error.reason for _, error in found.errors()} == {"too_long"}
    assert len(good) > 5 and lengths_of(found).max() <= max_length
    assert (sum(layout.lost_turns > 0 for layout in good.values()) > 5) == isinstance(policy, KeepTurns)


def test_turns_are_kept_as_long_as_they_fit_and_the_loss_is_counted(tmp_path, tokenizer):
    encoder = make_encoder(tokenizer)
    shards = write_shards(random_samples(60), tmp_path / "s")
    whole = lengths_of(read(encoder, shards, 100_000, DropTooLong()))
    limit = int(np.quantile(whole, 0.12))
    found = read(encoder, shards, limit, KeepTurns())
    dropped = read(encoder, shards, limit, DropTooLong())
    ends = read_ends(shards[0], encoder)
    cuts = {number: layout for number, layout in layouts_of(found).items() if layout.lost_turns}
    errors = {number for number, _ in found.errors()}
    assert {n for n, _ in dropped.errors()} == errors | set(cuts), "nothing but over-long samples is touched"
    for number, cut in cuts.items():
        lengths = [end.num_tokens + TILE_TOKENS * end.num_media for end in ends[number]]
        assert lengths[-1] == whole[number] > limit
        assert cut.num_tokens == lengths[cut.num_answers - 1] <= limit < lengths[cut.num_answers]
        assert cut.lost_turns == 2 * (len(lengths) - cut.num_answers)
        assert cut.lost_tokens == whole[number] - cut.num_tokens
    assert errors and cuts
    assert all(ends[number][0].num_tokens + TILE_TOKENS * ends[number][0].num_media > limit for number in errors)
    turns, tokens = sum(cut.lost_turns for cut in cuts.values()), sum(cut.lost_tokens for cut in cuts.values())
    assert found.shortened() == {"s": Shortened(len(cuts), turns, tokens)} and turns > 2
    assert dropped.shortened() == {"s": Shortened()}
    assert found.identity() != dropped.identity()


def test_media_of_dropped_turns_are_neither_read_nor_decoded(tmp_path, tokenizer, monkeypatch):
    answer = {"role": "assistant", "content": [{"type": "text", "text": "cats"}]}
    turns = [turn for k in range(3) for turn in ({"role": "user", "content": [{"type": "media", "index": k}]}, answer)]
    media = [{"kind": "image", "member": f"{k}.png"} for k in range(3)]
    sample = ("a", {"messages": turns, "media": media, "meta": {}}, {f"{k}.png": png(k) for k in range(3)})
    encoder = make_encoder(tokenizer)
    shards = write_shards([sample], tmp_path / "s")
    (ends,) = read_ends(shards[0], encoder)
    found = read(encoder, shards, ends[1].num_tokens + 2 * TILE_TOKENS, KeepTurns())
    layout = layouts_of(found)[0]
    assert (layout.num_answers, layout.lost_turns, layout.num_tiles) == (2, 2, 2)
    decodes, decode = [], Encoder.decode
    monkeypatch.setattr(
        Encoder,
        "decode",
        lambda self, key, medium, *rest: decodes.append(medium.member) or decode(self, key, medium, *rest),
    )
    dataset = RowDataset(found, encoder)
    encoded = dataset.encode(0, layout, encoder.new_tiles(layout.media))
    _, contents = dataset.read(0, layout)
    dataset.close()
    assert contents == [png(0), png(1)] and decodes == ["0.png", "1.png"]
    assert len(encoded.pixels) == 2 and (encoded.pixels[1] == 1).all(), "the second image, not the third"


def test_a_sample_cut_to_one_answer_has_the_media_of_its_turns():
    messages = tuple(
        Message(role=role, content=(k, "x") if role == "user" else ("y",))
        for k in range(3)
        for role in ("user", "assistant")
    )
    media = tuple(Media(kind="image", member=f"{k}.png") for k in range(3))
    sample = Sample(key="k", source="s", messages=messages, media=media)
    assert first_answers(sample, 3) == sample
    assert first_answers(sample, 1).messages == messages[:2] and first_answers(sample, 1).media == media[:1]


def test_nothing_depends_on_the_padding_token(tmp_path, tokenizer):
    assert tokenizer.pad_token is None
    messages = (Message(role="user", content=(0, "a")), Message(role="assistant", content=("two cats",)))
    sample = Sample(key="k", source="s", messages=messages, media=(Media(kind="image", member="0.png"),))
    pixels = np.zeros((1, 3, 8, 8), dtype=np.uint8)
    without = make_encoder(tokenizer).encode(sample, [MediaPlan()], pixels)
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = "</s>"  # the answer's end
    with_pad = make_encoder(padded).encode(sample, [MediaPlan()], pixels)
    assert torch.equal(without.labels, with_pad.labels) and torch.equal(without.loss_weights, with_pad.loss_weights)
    text = torch.ones(len(without.input_ids), dtype=torch.bool)
    text[without.image_positions] = False
    assert torch.equal(without.input_ids[text], with_pad.input_ids[text])
    assert padded.pad_token_id in with_pad.labels.tolist(), "an id that also pads is learnt where text has it"
