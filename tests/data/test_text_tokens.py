"""Workers take the tokens that were found when the text was counted."""

import numpy as np
import pytest

from eagle_train.data.index import index_stem
from eagle_train.data.layout import ensure_layout, has_layout
from eagle_train.data.loader import RowDataset
from eagle_train.data.shards import write_shards
from eagle_train.data.text_tokens import lists_of
from eagle_train.data.too_long import DropTooLong, KeepTurns
from eagle_train.train.stage_data import make_layout
from tests.data.test_too_long import (  # noqa: F401 (a fixture)
    layouts_of,
    lengths_of,
    make_encoder,
    random_samples,
    read,
    tokenizer,
)


def same(one, other):
    names = ("input_ids", "labels", "loss_weights", "image_positions", "pixels")
    return all(getattr(one, name).equal(getattr(other, name)) for name in names)


@pytest.fixture
def refusing(monkeypatch):
    """Tokenizing a conversation, and reading one, fails."""

    def refuse(*args, **options):
        raise AssertionError("a worker read or tokenized a conversation")

    def start():
        monkeypatch.setattr("eagle_train.data.chat.ChatTemplate.encode", refuse)
        monkeypatch.setattr("eagle_train.data.indexed_samples.load_object", refuse)

    return start


@pytest.mark.parametrize("template", ["vicuna_v1", "plain", "chatml", "yi_chatml"])
def test_rows_are_made_without_tokenizing_and_equal_those_that_are_tokenized(
    tmp_path,
    tokenizer,  # noqa: F811
    refusing,
    template,
):
    encoder = make_encoder(tokenizer, template)
    shards = write_shards(random_samples(40), tmp_path / "s", samples_per_shard=25)
    found = read(encoder, shards, 100_000, DropTooLong())
    dataset = RowDataset(found, encoder)
    tokenized = {}
    for number, layout in layouts_of(found).items():
        sample, data = dataset.read(number, layout)
        tiles = encoder.new_tiles(layout.media)
        encoder.decode_all(sample.key, sample.media, layout.media, data, tiles)
        tokenized[number] = encoder.encode(sample, layout.media, tiles)
    assert len(tokenized) > 20
    refusing()
    for number, expected in tokenized.items():
        layout = layouts_of(found)[number]
        assert same(dataset.encode(number, layout, encoder.new_tiles(layout.media)), expected)


def test_a_shortened_text_is_tokenized_again(tmp_path, tokenizer, refusing):  # noqa: F811
    encoder = make_encoder(tokenizer, "plain")  # whose answers may share a token with what follows
    shards = write_shards(random_samples(40), tmp_path / "s")
    max_length = int(np.quantile(lengths_of(read(encoder, shards, 100_000, KeepTurns())), 0.3))
    found = read(encoder, shards, max_length, KeepTurns())
    cut = [(number, layout) for number, layout in layouts_of(found).items() if layout.lost_turns]
    assert cut
    refusing()
    for number, layout in cut:
        with pytest.raises(AssertionError, match="a worker"):
            RowDataset(found, encoder).encode(number, layout, encoder.new_tiles(layout.media))


def test_texts_that_were_deleted_are_made_again(tmp_path, tokenizer):  # noqa: F811
    encoder = make_encoder(tokenizer)
    (shard,) = write_shards(random_samples(5), tmp_path / "s")
    layout = make_layout(encoder, 100_000, DropTooLong())
    path = ensure_layout(shard, None, "s", layout)
    (texts,) = index_stem(shard, None).parent.glob("*.text-*.arrow")
    before = [path.read_bytes(), texts.read_bytes()]
    texts.unlink()
    assert not has_layout(shard, None, layout.fingerprint)
    assert ensure_layout(shard, None, "s", layout) == path and [path.read_bytes(), texts.read_bytes()] == before


def test_more_tokens_than_a_column_can_count_are_refused_by_name():
    many = np.broadcast_to(np.int32(0), 1 << 30)  # takes no memory
    with pytest.raises(ValueError, match="a shard with 2147483648 tokens of text; at most 2147483647 fit"):
        lists_of([many, many])
