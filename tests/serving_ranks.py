"""`python -m tests.serving_ranks OUT` on two ranks: answers by weights that stay sharded, each rank its own questions.

Every rank writes what it said, and the most elements of parameters that it held whole at once; `tests/test_serving.py`
compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from eagle_train import dist
from eagle_train.data.positions import sequential
from eagle_train.model.generate import WHOLE, Access, Prompt
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.evaluate import Question, answer
from eagle_train.train.optim import freeze
from eagle_train.train.schedule import Stage
from eagle_train.train.serving import served
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.train.zero.serving import units_of
from eagle_train.types import Sample
from tests.toys import TILE, TOKENS_PER_TILE, VOCAB, tiny_model

LAYERS = 6
BATCHES = (((2, 0), (1,)), ((0,), (3, 1, 0)), ((1, 2), ()))
"""Tiles of each question, by batch and rank; in the last batch one rank has none."""
RATES = {"mixture": 1e-3, "projector": 1e-3, "llm": 1e-3}


def make() -> VisionLanguageModel:
    """Returns a model most of which is the layers of its LLM."""
    return tiny_model(num_hidden_layers=LAYERS, intermediate_size=256).eval()


def prompt(number: int, tiles: int) -> Prompt:
    """Returns a question of random tokens about `tiles` tiles."""
    generator = torch.Generator().manual_seed(number)
    length = tiles * TOKENS_PER_TILE + 5 + number
    ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
    pixels = torch.randint(0, 256, (tiles, 3, TILE, TILE), generator=generator, dtype=torch.uint8)
    return Prompt(ids, list(range(tiles * TOKENS_PER_TILE)), pixels, torch.arange(length))


class Words:
    """Stands for an encoder of samples: a token is a word of digits, and those below 12 end an answer."""

    image_id = 0
    positions = staticmethod(sequential)

    @property
    def template(self) -> Words:
        return self

    @property
    def tokenizer(self) -> Words:
        return self

    def stop_ids(self, tokenizer: Words) -> list[int]:
        return list(range(12))

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def said(model: VisionLanguageModel, batch: int, rank: int, access: Access = WHOLE) -> list[str]:
    """Returns the answers, of unlike length, to a rank's questions of a batch."""
    prompts = [prompt(10 * batch + 5 * rank + i, tiles) for i, tiles in enumerate(BATCHES[batch][rank])]
    questions = [Question(Sample(key="s/0", source="s", messages=(), media=()), one, ()) for one in prompts]
    return answer(model, Words(), questions, 8, access)


def main(out: Path) -> None:
    """Answers with shards that an engine has left behind."""
    dist.init(timeout_seconds=60)
    model, stage = make(), Stage(recipe="x", learning_rates=RATES, max_length=8, rows_per_step=1, num_steps=1)
    freeze(model, RATES)
    engine = ZeroEngine(model, stage, 1, zero_stage=3, bf16=False, persistence_threshold=0)
    engine.close()
    model.eval()
    held: list[int] = []
    for unit in [*units_of(model.llm), model.mixture, model.projector]:
        unit.register_forward_hook(lambda *_: held.append(sum(p.numel() for p in model.parameters())))
    with served(engine.placement, model, make().to("meta"), whole=False) as access:
        answers = [said(model, batch, dist.rank(), access) for batch in range(len(BATCHES))]
    left = sum(parameter.numel() for parameter in model.parameters())
    torch.save({"answers": answers, "held": max(held), "left": left}, out / f"{dist.rank()}.pt")
    dist.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
