"""InternLM2's published attention, computed from its own fused weights, is that of the Llama that it becomes."""

import torch
from torch.nn import functional as F

from eagle_train.model.checkpoints.files import same, write_weights
from eagle_train.model.checkpoints.internlm2 import from_llama, join_heads, split_heads, to_llama
from eagle_train.model.embeddings import Vocabulary
from eagle_train.model.llm import build_llm
from eagle_train.train.pretrained import load_llm
from tests.internvl_layout import internlm2_shapes

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
HEADS = (8, 2)
THETA, EPS = 1e6, 1e-5


def weights():
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * 0.3 + ("norm" in name)
        for name, shape in internlm2_shapes(SIZES).items()
    }


def llama(**changes):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": THETA}
    return build_llm(model_type="llama", rms_norm_eps=EPS, rope_parameters=rope, **SIZES, **changes).eval()


def norm(x, weight):
    return weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def turned(x, angles):
    """Rotary embedding of (T, heads, D): the first half of the channels with the second."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def internlm2_logits(w, ids):
    """The published forward pass of one sequence, with loops in place of reshapes."""
    num_heads, num_kv = HEADS
    size = SIZES["hidden_size"] // num_heads
    groups = num_heads // num_kv
    angles = torch.outer(torch.arange(len(ids)).float(), THETA ** -(torch.arange(0, size, 2) / size))
    x = w["model.tok_embeddings.weight"][ids]
    mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)
    for n in range(SIZES["num_hidden_layers"]):
        layer = f"model.layers.{n}."
        fused = norm(x, w[f"{layer}attention_norm.weight"]) @ w[f"{layer}attention.wqkv.weight"].T
        heads = []
        for kv in range(num_kv):
            # Of each head of keys: its heads of queries, then keys, then values.
            part = fused[:, kv * (groups + 2) * size : (kv + 1) * (groups + 2) * size].split(size, dim=1)
            key, value = turned(part[-2][:, None], angles)[:, 0], part[-1]
            for query in part[:groups]:
                scores = turned(query[:, None], angles)[:, 0] @ key.T / size**0.5 + mask
                heads.append(scores.softmax(-1) @ value)
        x = x + torch.cat(heads, dim=1) @ w[f"{layer}attention.wo.weight"].T
        y = norm(x, w[f"{layer}ffn_norm.weight"])
        gate, up = (y @ w[f"{layer}feed_forward.{name}.weight"].T for name in ("w1", "w3"))
        x = x + (F.silu(gate) * up) @ w[f"{layer}feed_forward.w2.weight"].T
    return norm(x, w["model.norm.weight"]) @ w["output.weight"].T


@torch.no_grad()
def test_the_published_forward_pass_is_llamas():
    theirs, model = weights(), llama()
    model.load_state_dict(to_llama(theirs, *HEADS))
    ids = torch.randint(0, 40, (17,), generator=torch.Generator().manual_seed(1))
    wanted = internlm2_logits(theirs, ids)
    found = model(input_ids=ids[None], use_cache=False).logits[0]
    assert wanted.std() > 0.5
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_names_and_bits_come_back():
    theirs = weights()
    back = from_llama(to_llama(theirs, *HEADS), *HEADS)
    assert back.keys() == theirs.keys() and all(same(back[name], tensor) for name, tensor in theirs.items())


def test_biases_are_split_as_weights_are():
    bias = torch.arange(12.0 * 4)
    queries, keys, values = split_heads(bias, *HEADS)
    assert queries.tolist() == [*range(16), *range(24, 40)]
    assert keys.tolist() == [*range(16, 20), *range(40, 44)] and values.tolist() == [*range(20, 24), *range(44, 48)]
    assert torch.equal(join_heads(queries, keys, values, *HEADS), bias)


def test_a_head_that_the_source_ties_starts_as_its_embeddings(tmp_path):
    theirs = to_llama(weights(), *HEADS)
    del theirs["lm_head.weight"]
    write_weights(tmp_path, theirs)
    model = llama(pretrained=str(tmp_path), tie_word_embeddings=False)
    start = load_llm(model, Vocabulary(num_tokens=40, new=()))
    assert "lm_head.weight: the embeddings" in start.note
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_an_llm_starts_from_internlm2s_own_files(tmp_path):
    theirs = weights()
    write_weights(tmp_path, theirs)
    model = llama(pretrained=str(tmp_path))
    start = load_llm(model, Vocabulary(num_tokens=40, new=()))
    assert start.loaded == len(model.state_dict()) and not start.fresh
    assert torch.equal(model.lm_head.weight, theirs["output.weight"])
