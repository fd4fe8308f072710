"""Memory between pixels and loss is in proportion to the row, whatever is in it, on the meta device and the CPU."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eagle_train.data.collate import pack
from eagle_train.model.memory import LiveBytes, activation_bytes, forget_gradient, meta_row
from eagle_train.model.recompute import saved_on_host
from eagle_train.types import IGNORE_INDEX, EncodedSample
from tests.toys import TILE, TOKENS_PER_TILE, VOCAB, tiny_model

LENGTHS = (128, 256, 512)
KINDS = {
    "text": lambda length: [(0, length)],
    "image": lambda length: [(1, TOKENS_PER_TILE + 28)] * (length // 32),
    "video": lambda length: [(length // 16, length)],  # every frame a tile, in one sample
}
WAYS = {
    "kept": lambda model: None,
    "recomputed": lambda model: model.set_activation_checkpointing(),
    "offloaded": lambda model: model.set_activation_checkpointing(offload=True),
}


def sample(number, tiles, length):
    """Returns a sample whose tiles come first and whose last half is supervised."""
    ids = torch.randint(1, VOCAB, (length,), generator=torch.Generator().manual_seed(number))
    labels = ids.roll(-1)
    labels[: length // 2] = labels[-1] = IGNORE_INDEX
    return EncodedSample(
        key=f"s/{number}",
        source="s",
        input_ids=ids,
        labels=labels,
        loss_weights=(labels >= 0).float(),
        image_positions=torch.arange(tiles * TOKENS_PER_TILE),
        pixels=torch.zeros(tiles, 3, TILE, TILE, dtype=torch.uint8),
    )


def row(kind, length):
    shapes = KINDS[kind](length)
    assert sum(tokens for _, tokens in shapes) == length
    return pack([sample(i, *shape) for i, shape in enumerate(shapes)], [], filler_id=0, tile_size=TILE)


def blank_row(length, *, num_tiles, num_targets):
    """Returns a row on the meta device."""
    return meta_row(
        length, num_tiles=num_tiles, num_targets=num_targets, tokens_per_tile=TOKENS_PER_TILE, tile_size=TILE
    )


def model_in(way, device="cpu"):
    with torch.device(device):
        model = tiny_model().train()
    model.mixture.micro_batch = 4
    WAYS[way](model)
    return model


def held(model, batch):
    """Returns the live bytes at the peak of a forward and backward pass."""
    hooks = [parameter.register_post_accumulate_grad_hook(forget_gradient) for parameter in model.parameters()]
    gc.collect()
    with LiveBytes("cpu", known=[*model.parameters(), *model.buffers()]) as live:
        model(batch).sum().backward()
    for hook in hooks:
        hook.remove()
    return live.peak


def slopes(found):
    """Returns the bytes that a token more takes, between each length and the next."""
    return [(more - less) / (b - a) for less, more, a, b in zip(found, found[1:], LENGTHS, LENGTHS[1:], strict=False)]


@pytest.mark.parametrize("kind", ["text", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("image", "video"))])
@pytest.mark.parametrize("way", ["kept", pytest.param("recomputed", marks=pytest.mark.slow)])
def test_a_token_takes_the_same_in_a_row_twice_as_long(way, kind):
    model = model_in(way)
    first, second = slopes([held(model, row(kind, length)) for length in LENGTHS])
    assert first > 0 and second == pytest.approx(first, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("tiles", [0, 1])
@pytest.mark.parametrize("way", WAYS)
def test_so_it_does_on_the_meta_device(way, tiles):
    model = model_in(way, "meta")
    found = []
    for length in LENGTHS:
        batch = blank_row(length, num_tiles=tiles * length // 16, num_targets=length // 2)
        found.append(activation_bytes(model, batch))
    first, second = slopes(found)
    assert first > 0 and second == pytest.approx(first, rel=0.05)


@pytest.mark.parametrize("kind", [pytest.param("text", marks=pytest.mark.slow), "video"])
@pytest.mark.parametrize("way", ["kept", pytest.param("recomputed", marks=pytest.mark.slow)])
def test_the_estimate_is_what_the_cpu_holds(way, kind):
    length = LENGTHS[-1]
    batch = row(kind, length)
    on_cpu = held(model_in(way), batch)
    tiles = batch.num_images
    blank = blank_row(length, num_tiles=tiles, num_targets=batch.num_targets)
    given = sum(t.nbytes for t in (blank.input_ids, blank.labels, blank.loss_weights, blank.position_ids))
    given += blank.pixels.nbytes + blank.image_positions.nbytes + blank.cu_seqlens.nbytes
    estimate = activation_bytes(model_in(way, "meta"), blank)
    assert estimate - given == pytest.approx(on_cpu, rel=0.03)


def estimate(way, micro_batch, *, length, tiles):
    model = model_in(way, "meta")
    model.mixture.micro_batch = micro_batch
    return activation_bytes(model, blank_row(length, num_tiles=tiles, num_targets=7))


@pytest.mark.slow
def test_recomputed_micro_batches_spare_what_recomputed_layers_keep():
    kept, layers, pieces = (
        estimate(*way, length=128, tiles=32) for way in [("kept", None), ("recomputed", None), ("recomputed", 2)]
    )
    assert pieces < layers < kept


def test_offload_holds_few_layer_inputs_where_checkpointing_holds_all():
    layers = [torch.nn.Linear(64, 64, device="meta") for _ in range(10)]
    peaks = []
    for context in (nullcontext(), saved_on_host(torch.device("meta"))):
        hidden = torch.empty(8192, 64, device="meta").requires_grad_()  # 2 MiB, as the input of every layer
        with LiveBytes("meta", known=[hidden]) as live:
            with context:
                out = hidden
                for layer in layers:
                    out = checkpoint(lambda x, layer=layer: layer(x).tanh(), out, use_reentrant=False)
            out.sum().backward()
        peaks.append(live.peak / hidden.nbytes)
    assert peaks[0] - peaks[1] > 5, peaks


@pytest.mark.slow
def test_dense_attention_would_be_found():
    class Dense(torch.nn.Module):
        def forward(self, batch):
            scores = batch.loss_weights[:, None] * self.weight * batch.loss_weights
            return scores.sum(dim=1)

    model = Dense()
    model.weight = torch.nn.Parameter(torch.ones(()))
    first, second = slopes([held(model, row("text", length)) for length in LENGTHS])
    assert second > 1.9 * first


def test_storages_count_once_and_while_they_live():
    known = torch.zeros(1000)
    with LiveBytes("cpu", known=[known]) as live:
        kept = torch.ones(250)
        view = kept.view(5, 50)[1:]
        known.view(10, 100)[0].mul_(2)
        assert live.now == live.peak == 1000
        gone = kept + 1
        assert live.now == 2000
        del gone
        assert (live.now, live.peak) == (1000, 2000)
        del kept
        assert live.now == 1000 and view.numel() == 200
        del view
        assert live.now == 0


def test_more_tiles_than_tokens_are_refused():
    with pytest.raises(ValueError, match="3 tiles of 4 tokens do not fit into a row of 11"):
        blank_row(11, num_tiles=3, num_targets=1)
