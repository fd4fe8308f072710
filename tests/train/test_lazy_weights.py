"""A run that starts from another's checkpoint reads each weight once, on the ranks whose values count."""

import pytest
import torch
from torch import nn

from eagle_train.model.lora import MergedWeights
from eagle_train.train.load import copy, load_weights
from eagle_train.train.pieces import CheckpointWeights, PieceReader, replicated_pieces, saved_tensors, write_pieces


class CountingReader(PieceReader):
    """Notes what is read."""

    def __init__(self, folder):
        super().__init__(folder)
        self.asked = []

    def read(self, name, kind, start=0, count=None):
        self.asked.append(name)
        return super().read(name, kind, start, count)


def make(seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_buffer("scale", torch.rand(2))
    return model


@pytest.fixture
def written(tmp_path):
    model = make(0)
    write_pieces(tmp_path, list(replicated_pieces(saved_tensors(model), {})))
    return model, CountingReader(tmp_path)


def test_every_weight_is_read_once(written):
    model, reader = written
    started = make(1)
    load_weights(started, MergedWeights(CheckpointWeights(reader), {}))
    assert sorted(reader.asked) == sorted(model.state_dict())
    assert all(torch.equal(started.state_dict()[name], value) for name, value in model.state_dict().items())


def test_a_rank_whose_values_do_not_count_reads_buffers_alone(written):
    model, reader = written
    started, given = make(1), {}

    def put(tensor, value):
        given[id(tensor)] = value
        if not isinstance(tensor, nn.Parameter):
            copy(tensor, value)

    load_weights(started, MergedWeights(CheckpointWeights(reader), {}), put=put, reads=False)
    assert reader.asked == ["scale"] and torch.equal(started.scale, model.scale)
    assert all(given[id(parameter)].shape == parameter.shape for parameter in started.parameters())


def test_a_shape_that_does_not_fit_is_told_before_anything_is_read(written):
    _, reader = written
    other = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
    other.register_buffer("scale", torch.rand(2))
    with pytest.raises(ValueError, match=r"2 misshapen: 1.weight \(2, 4\) instead of \(3, 4\)"):
        load_weights(other, MergedWeights(CheckpointWeights(reader), {}))
    assert reader.asked == []
