"""Every backend gives what each sample gives alone, in outputs and gradients, through the model too."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from eagle_train.model.attention.backend import Segments
from eagle_train.model.attention.first_available import FirstAvailable
from eagle_train.model.attention.flash import FlashAttention, flash_attention_2, flash_attention_3
from eagle_train.model.attention.flex import FlexAttention, block_mask
from eagle_train.model.attention.limits import KernelLimits
from eagle_train.model.attention.packed import packed_attention
from eagle_train.model.attention.segments import SegmentAttention
from eagle_train.model.attention.varlen import VarlenAttention
from tests.model.attention.kernels import CPU, dense, flash_2, flash_3, varlen_2_11, varlen_2_15
from tests.toys import gradients, tiny_model, tiny_row, tiny_sample, weighted_loss

BACKENDS = {
    "segments": SegmentAttention,
    "varlen 2.15": partial(VarlenAttention, varlen_2_15, CPU),
    "varlen 2.11": partial(VarlenAttention, varlen_2_11, CPU),
    "flash 2": partial(FlashAttention, "flash_attn", lambda: flash_2, CPU),
    "flash 3": partial(FlashAttention, "flash_attn_interface", lambda: flash_3, CPU),
    "flex": partial(FlexAttention, compiled=False),
}
WITH_BACKWARD = sorted(set(BACKENDS) - {"flex"})
ON_GPU = {"varlen": VarlenAttention, "flash 2": flash_attention_2, "flash 3": flash_attention_3, "flex": FlexAttention}
LENGTHS = (5, 1, 17, 9)

# Flex that is not compiled is here on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def random_tokens(lengths, *, heads=4, key_heads=2, head_dim=16, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), n, head_dim) for n in (heads, key_heads, key_heads)]
    made = [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]
    return [tensor.requires_grad_() for tensor in made]


def run(backend, tensors, segments, *, causal=True, backward=True):
    """Returns the output and the gradients of a weighted sum of it."""
    if not backward:
        tensors = [tensor.detach() for tensor in tensors]
    found = backend(*tensors, segments, scale=0.3, causal=causal)
    assert found.shape == tensors[0].shape
    if not backward:
        return [found]
    weights = torch.linspace(-1, 1, found.numel(), device=found.device).view_as(found)
    return [found.detach(), *torch.autograd.grad((found.float() * weights).sum(), tensors)]


CASES = [
    (name, causal, lengths, key_heads)
    for name in BACKENDS
    for causal in (True, False)
    for lengths in (LENGTHS, (8, 8, 8), (12,), (130, 3, 128))
    for key_heads in (4, 2, 1)
    if name != "flex" or (key_heads == 2 and len(lengths) > 1)  # seconds each
]


@pytest.mark.parametrize(("name", "causal", "lengths", "key_heads"), CASES)
def test_a_row_gives_what_its_samples_give_alone(name, causal, lengths, key_heads):
    tensors = random_tokens(lengths, key_heads=key_heads)
    backward = name in WITH_BACKWARD
    whole = run(BACKENDS[name](), tensors, Segments.of(lengths, "cpu"), causal=causal, backward=backward)

    def one_by_one(query, key, value, segments, **arguments):
        """The oracle: one (T, T) product per sample."""
        samples = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
        return torch.cat([dense(*s, torch.tensor([0, len(s[0])], dtype=torch.int32), **arguments) for s in samples])

    alone = run(one_by_one, tensors, None, causal=causal, backward=backward)
    for found, expected in zip(whole, alone, strict=True):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@needs_gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ON_GPU)
def test_a_kernel_of_the_gpu_gives_what_segments_give(name, dtype, key_heads, causal):
    lengths = (37, 1, 300, 128, 70)
    backend = ON_GPU[name]()
    tensors = random_tokens(lengths, heads=8, key_heads=key_heads, head_dim=64, dtype=dtype, device="cuda")
    if reason := backend.refusal(tensors[0]):
        pytest.skip(reason)
    segments = Segments.of(lengths, "cuda")
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    expected = run(SegmentAttention(), exact, segments, causal=causal)
    for mine, theirs in zip(run(backend, tensors, segments, causal=causal), expected, strict=True):
        assert (mine.float() - theirs).norm() / theirs.norm() < 2e-2


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", WITH_BACKWARD)
def test_a_model_has_the_losses_and_gradients_of_single_samples(name, checkpointing):
    samples = [tiny_sample(1, tiles=1), tiny_sample(2, tiles=0, text=20), tiny_sample(3, tiles=2)]
    results = []
    for rows, backend in (([samples], BACKENDS[name]()), ([[s] for s in samples], SegmentAttention())):
        model = tiny_model().train()
        model.attention = backend
        if checkpointing:
            model.set_activation_checkpointing()
        loss = weighted_loss(model, [tiny_row(row) for row in rows])
        loss.backward()
        results.append({"loss": loss.detach()} | gradients(model))
    packed, single = results
    assert packed.keys() == single.keys()
    for key in packed:
        torch.testing.assert_close(packed[key], single[key], atol=1e-5, rtol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


def test_a_model_has_the_losses_of_single_samples_by_flex():
    samples = [tiny_sample(1, tiles=1), tiny_sample(2, tiles=0, text=20)]
    model = tiny_model()
    model.attention = FlexAttention(compiled=False)
    with torch.no_grad():
        torch.testing.assert_close(
            model(tiny_row(samples)), torch.cat([model(tiny_row([s])) for s in samples]), atol=1e-5, rtol=1e-4
        )


def test_under_autocast_kernels_get_one_dtype():
    """Rotary positions leave queries and keys in float32 there, beside values in bfloat16."""
    query, key, value = random_tokens(LENGTHS)
    segments = Segments.of(LENGTHS, "cpu")
    for backend in (VarlenAttention(varlen_2_15, CPU), FlashAttention("flash_attn", lambda: flash_2, CPU)):
        with torch.autocast("cpu", torch.bfloat16):
            assert backend(query, key, value.bfloat16(), segments, scale=1.0, causal=True).dtype == torch.bfloat16


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lengths", [(5, 300, 128, 255, 80), (128, 128), (7,), (1, 127, 256, 3), (64,) * 9])
def test_flex_looks_at_all_blocks_it_must_and_no_other(lengths, causal):
    mask = block_mask(Segments.of(lengths, "cpu"), causal)
    length, blocks = sum(lengths), -(-sum(lengths) // 128)
    index = torch.arange(length)
    seen = mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index)
    padded = torch.zeros(blocks * 128, blocks * 128, dtype=torch.bool)
    padded[:length, :length] = seen
    squares = padded.unflatten(1, (blocks, 128)).unflatten(0, (blocks, 128))
    some, every = squares.any(3).any(1), squares.all(3).all(1)

    def chosen(counts, places):
        found = torch.zeros(blocks, blocks, dtype=torch.bool)
        for row in range(blocks):
            found[row, places[0, 0, row, : counts[0, 0, row]].long()] = True
        return found

    assert torch.equal(chosen(mask.full_kv_num_blocks, mask.full_kv_indices), every)
    assert torch.equal(chosen(mask.kv_num_blocks, mask.kv_indices), some & ~every)


@pytest.mark.slow
def test_flex_compiled_gives_what_segments_give():
    tensors, segments = random_tokens((5, 150, 60)), Segments.of((5, 150, 60), "cpu")
    (found,), (expected,) = (run(b, tensors, segments, backward=False) for b in (FlexAttention(), SegmentAttention()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_flex_makes_a_rows_mask_once():
    backend, first, second = FlexAttention(compiled=False), Segments.of((3, 4), "cpu"), Segments.of((3, 4), "cpu")
    mask = backend.mask(first, True)
    assert backend.mask(first, True) is mask
    assert backend.mask(first, False) is not mask
    assert backend.mask(second, True) is not mask


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        (VarlenAttention(), r"attention=varlen cannot run: it runs on cuda, not on cpu; set attention=auto or"),
        (flash_attention_2(), r"flash_attn cannot run: it runs on cuda, not on cpu; .*attention=auto"),
        (FlexAttention(compiled=False), r"attention=flex cannot run: .*no backward pass on a CPU; set attention=auto"),
        (FirstAvailable([VarlenAttention()]), r"no attention can run: not varlen: it runs on cuda.*attention=segments"),
        (VarlenAttention(varlen_2_15, KernelLimits(device_type="cpu")), "float16 or bfloat16, not in float32"),
    ],
)
def test_a_backend_that_cannot_run_says_why_and_what_can(backend, said):
    with pytest.raises(ValueError, match=said):
        run(backend, random_tokens(LENGTHS), Segments.of(LENGTHS, "cpu"))


def test_a_kernel_refuses_head_dimensions_it_does_not_have():
    limits = KernelLimits(device_type="cpu", dtypes=(torch.float32,))
    assert limits.refusal(torch.zeros(3, 2, 64)) is None
    assert "multiple of 8, not 20" in limits.refusal(torch.zeros(3, 2, 20))
    assert "at most 256" in limits.refusal(torch.zeros(3, 2, 264))


@pytest.mark.parametrize(
    ("capability", "said"),
    [((8, 0), "needs compute capability 9.x, and this GPU has 8.0"), ((10, 0), "9.x"), ((9, 0), "")],
)
def test_flash_attention_3_is_for_hopper_alone(monkeypatch, capability, said):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    query = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(3, 2, 64))
    reason = flash_attention_3().limits.refusal(query)
    assert said in reason if said else reason is None
    assert KernelLimits().refusal(query) is None


def test_a_package_that_is_not_installed_is_named():
    def missing():
        raise ImportError("No module named 'flash_attn'")

    backend = FlashAttention("flash_attn", missing, CPU)
    with pytest.raises(ValueError, match=r"flash_attn is not usable: No module named 'flash_attn'; install it"):
        run(backend, random_tokens(LENGTHS), Segments.of(LENGTHS, "cpu"))


def test_the_first_that_can_run_is_taken_and_why_is_said():
    segments = SegmentAttention()
    backend = FirstAvailable([VarlenAttention(), VarlenAttention(varlen_2_15, CPU), segments])
    assert str(backend) == "varlen or varlen or segments"
    query = torch.zeros(3, 2, 16)
    assert backend.choose(query) is backend.candidates[1]
    assert str(backend) == "varlen on cpu in float32; not varlen: it runs on cuda, not on cpu"
    assert backend.choose(query.double()) is segments  # chosen anew for another dtype
    with torch.autocast("cpu", torch.bfloat16):
        assert backend.choose(query.double()) is backend.candidates[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"dropout": 0.1}, "set llm.attention_dropout=0"),
        ({"sliding_window": 4}, "attends within 4 tokens, and the row has a sample of 17"),
        ({"softcap": 30.0}, "asks for softcap"),
    ],
)
def test_a_layer_that_asks_for_other_attention_is_refused(arguments, said):
    tensors = [t.transpose(0, 1)[None] for t in random_tokens(LENGTHS)]
    packed = {"attention_backend": SegmentAttention(), "segments": Segments.of(LENGTHS, "cpu")}
    packed_attention(torch.nn.Identity(), *tensors, None, scaling=1.0, sliding_window=17, **packed)
    with pytest.raises(ValueError, match=said):
        packed_attention(torch.nn.Identity(), *tensors, None, scaling=1.0, **packed, **arguments)


def test_a_layer_that_was_not_given_the_segments_refuses_the_row():
    tensors = [t.transpose(0, 1)[None] for t in random_tokens(LENGTHS)]
    stand_in = torch.zeros(1, 1, 1, 1, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="Identity was not given the segments"):
        packed_attention(torch.nn.Identity(), *tensors, stand_in, scaling=1.0)
