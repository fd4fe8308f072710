"""What waits in host memory comes back as it was; micro-batches of tiles are recomputed one at a time."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from eagle_train.model.prealign import PreAlignment
from eagle_train.model.projector import MlpProjector
from eagle_train.model.recompute import HostStore, Waiting, saved_on_host
from eagle_train.train.engine import spare_activations
from tests.toys import gradients, tiny_model, tiny_row, tiny_sample, weighted_loss

ROWS = [
    tiny_row([tiny_sample(1, tiles=1), tiny_sample(2, tiles=0, text=20), tiny_sample(3, tiles=2)]),
    tiny_row([tiny_sample(4, tiles=0)]),
]
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")),
]


def trained(model):
    """Returns the loss of the rows and its gradients by name."""
    loss = weighted_loss(model, ROWS)
    loss.backward()
    return loss.detach(), gradients(model)


def assert_equal_to_the_bit(one, other):
    assert torch.equal(one[0], other[0]) and one[1].keys() == other[1].keys()
    for name, gradient in one[1].items():
        assert torch.equal(gradient, other[1][name]), name


@pytest.mark.parametrize("aligned", [False, True])
def test_offload_changes_no_bit(monkeypatch, aligned):
    def model():
        torch.manual_seed(0)
        whole = tiny_model().train()
        return PreAlignment(whole, "vit", MlpProjector) if aligned else whole

    kept, recomputed, offloaded = model(), model(), model()
    recomputed.set_activation_checkpointing()
    offloaded.set_activation_checkpointing(offload=True)
    stores = []

    def everything_on_host(device):
        stores.append(HostStore(device, min_bytes=0))
        return torch.autograd.graph.saved_tensors_hooks(stores[-1].leave, stores[-1].come_back)

    monkeypatch.setattr("eagle_train.model.vlm.saved_on_host", everything_on_host)
    wanted = trained(kept)
    assert_equal_to_the_bit(trained(recomputed), wanted)
    assert_equal_to_the_bit(trained(offloaded), wanted)
    assert len(stores) == len(ROWS)
    for store in stores:
        assert store.waiting and all(kept.used and kept.returned is None for kept in store.waiting)


def layers_of(width, depth, device):
    torch.manual_seed(0)
    return torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(depth)).to(device)


def through(layers, hidden):
    for layer in layers:
        hidden = checkpoint(lambda x, layer=layer: torch.tanh(layer(x)), hidden, use_reentrant=False)
    return hidden


@pytest.mark.parametrize("device", DEVICES)
def test_layer_inputs_leave_in_order_and_come_back_one_ahead(device):
    layers = layers_of(8, 4, device)
    store = HostStore(torch.device(device), min_bytes=0)
    fetched = []
    hidden = torch.randn(16, 8, device=device).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(store.leave, store.come_back):
        out = through(layers, hidden)
    tensors = [kept for kept in store.waiting if kept.host.shape == hidden.shape]
    assert len(tensors) == 4 and torch.equal(tensors[0].host, hidden.detach().cpu())
    assert len(store.leaving) == 1, "the device still holds inputs that have left"

    def note(grad, place):
        fetched.append((place, [kept.place for kept in store.waiting if kept.returned is not None]))

    for place, layer in enumerate(layers):
        layer.weight.register_hook(lambda grad, place=place: note(grad, place))
    out.sum().backward()
    assert [place for place, _ in fetched] == [3, 2, 1, 0]
    assert all(len(ahead) <= 1 for _, ahead in fetched), "more than one input was fetched ahead"
    assert any(ahead for _, ahead in fetched) and not store.leaving


class Recorded:
    """A device module whose streams note what they are asked for, as (stream, what, of what)."""

    def __init__(self):
        self.asked = []
        self.events = 0
        self.named = {name: RecordedStream(name, self) for name in ("compute", "copies")}

    def current_stream(self):
        return self.named["compute"]


class RecordedStream:
    def __init__(self, name, module):
        self.name, self.module = name, module

    def wait_stream(self, other):
        self.module.asked.append((self.name, "waits for", other.name))

    def wait_event(self, event):
        self.module.asked.append((self.name, "waits for", event))

    def record_event(self):
        self.module.events += 1
        self.module.asked.append((self.name, "copies", self.module.events))
        return self.module.events


def test_computation_waits_for_no_copy_that_has_just_been_begun():
    store = HostStore(torch.device("cpu"), min_bytes=0)
    store.module = module = Recorded()
    store.copies = module.named["copies"]
    kept = [store.leave(torch.ones(4)) for _ in range(3)]
    begun = ("copies", "waits for", "compute")
    assert module.asked == [
        *(begun, ("copies", "copies", 1)),
        *(begun, ("copies", "copies", 2), ("compute", "waits for", 1)),
        *(begun, ("copies", "copies", 3), ("compute", "waits for", 2)),
    ]
    module.asked.clear()
    for waiting in reversed(kept):
        store.come_back(waiting)
    fetched = ("compute", "waits for", "copies")
    assert module.asked == [
        ("compute", "waits for", 3),  # the last one may still be on its way out
        *(begun, ("copies", "copies", 4), fetched),  # nothing could be fetched ahead of the first
        *(begun, ("copies", "copies", 5)),  # ahead of the next, beside the first one's layer
        *(fetched, begun, ("copies", "copies", 6)),
        fetched,
    ]


@pytest.mark.parametrize("device", DEVICES)
def test_a_second_backward_pass_finds_the_same(device):
    layers = layers_of(8, 3, device)
    hidden = torch.randn(16, 8, device=device).requires_grad_()
    with saved_on_host(torch.device(device), min_bytes=0):
        loss = through(layers, hidden).square().sum()
    once, twice = (torch.autograd.grad(loss, layers.parameters(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, twice, strict=True))


def test_parameters_and_small_tensors_stay_where_they_are():
    store = HostStore(torch.device("cpu"), min_bytes=1024)
    parameter, small = torch.nn.Parameter(torch.ones(1000)), torch.ones(255)
    assert store.leave(parameter) is parameter and store.leave(small) is small
    assert isinstance(store.leave(torch.ones(256)), Waiting)
    transposed = torch.arange(600.0).view(20, 30).t()
    back = store.come_back(store.leave(transposed))
    assert torch.equal(back, transposed) and back.stride() == transposed.stride()


def test_offload_alone_is_refused():
    with pytest.raises(ValueError, match=r"activation_offload needs engine\.activation_checkpointing=true"):
        spare_activations(tiny_model(), checkpointing=False, offload=True)


@pytest.mark.parametrize("recompute", [True, False])
def test_micro_batches_are_recomputed_and_change_no_bit(recompute):
    kept, recomputed = tiny_model().train(), tiny_model().train()
    for model in (kept, recomputed):
        model.mixture.micro_batch = 1
        for encoder in model.mixture.encoders.values():
            encoder.recompute = recompute
    recomputed.set_activation_checkpointing()
    passes = []
    recomputed.mixture.encoders["vit"].register_forward_hook(lambda *_: passes.append(1))
    wanted = trained(kept)
    assert_equal_to_the_bit(trained(recomputed), wanted)
    assert len(passes) == 3 * 2 + 1, "three tiles forward and again backward, one placeholder forward"


def test_tiles_of_frozen_encoders_are_seen_once():
    model = tiny_model().train()
    model.mixture.requires_grad_(False)
    model.mixture.micro_batch = 1
    model.set_activation_checkpointing()
    passes = []
    model.mixture.encoders["vit"].register_forward_hook(lambda *_: passes.append(1))
    model(ROWS[0]).sum().backward()
    assert len(passes) == 3 and model.projector.layers[0].weight.grad is not None
