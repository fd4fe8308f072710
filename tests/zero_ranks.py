"""`python -m tests.zero_ranks OUT` on two ranks: what ZeRO-3 makes of rows with and without images.

Rank 0 writes what became of each case; `tests/test_zero3.py` compares it with plain torch in one process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

from eagle_train import dist
from eagle_train.model.encoders.base import VisionEncoder
from eagle_train.model.encoders.intern_vit import InternVit
from eagle_train.model.encoders.siglip import Siglip
from eagle_train.model.lora import Lora
from eagle_train.model.mixtures.channel_concat import ChannelConcat
from eagle_train.model.prealign import PreAlignment
from eagle_train.model.projector import MlpProjector
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.engine import Engine, PlainEngine
from eagle_train.train.optim import freeze
from eagle_train.train.schedule import Stage
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.types import PackedBatch
from tests import qwen2_vl
from tests.engine_facts import facts
from tests.qwen2_vl import tiny_qwen2_vl
from tests.toys import tiny_model, tiny_row, tiny_sample

RATES = {
    "trained": {"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2},
    "frozen": {"mixture": None, "projector": 1e-2, "llm": None},
    "one_trained": {"mixture": None, "mixture.encoders.convnext": 1e-2, "projector": None, "llm": 1e-2},
    "norms_trained": {
        "mixture": 1e-2,
        "mixture.encoders": None,
        "projector": None,
        "llm": None,
    },
    "eagle2": {"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2},
    "internvl2": {"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2},
    "qwen2_vl": {"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2},
    "aligned": {"mixture": None, "mixture.encoders.vit": 1e-2, "projector": None, "llm": None, "aligner": 1e-2},
    "lora": {"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2},
}
ADAPTERS = {
    "llm": Lora(rank=4, alpha=8, dropout=0.0, targets=["q_proj", "v_proj", "down_proj"]),
    "mixture.encoders.vit": Lora(rank=2, alpha=4, dropout=0.0, targets=["q_proj", "fc1"]),
}
SIZES = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
# Tiles of the rows of both ranks in every step: images on both, on one, on the other, on none, of unlike number.
PICTURES = [(qwen2_vl.IMAGE, (1, 2, 3)), (qwen2_vl.VIDEO, (3, 1, 2)), (qwen2_vl.IMAGE, (1, 1, 1))]
TILES = [(2, 1), (0, 1), (0, 0), (3, 0)]
SAVED = 2


def make(case: str) -> tuple[nn.Module, Stage]:
    """Returns the model and the stage of a case."""
    align = "vit" if case == "aligned" else None
    stage = Stage(
        recipe="x",
        learning_rates=RATES[case],
        max_length=256,
        rows_per_step=2,
        num_steps=len(TILES),
        max_grad_norm=None if case in ("trained", "eagle2", "internvl2") else 1.0,
        eps=1e-4,  # so that Adam does not blow up the rounding of gradients that are zero
        align=align,
    )
    model: nn.Module = MODELS.get(case, tiny_model)()
    model.mixture.micro_batch = 1  # ranks encode tiles in unlike numbers of pieces
    adapters = ADAPTERS if case == "lora" else {}
    for name, lora in adapters.items():
        lora.add_to(name, model.get_submodule(name))
    if align:
        model = PreAlignment(model, align, MlpProjector)
    freeze(model, stage.learning_rates, adapters)
    return model, stage


def tiny_eagle2() -> VisionLanguageModel:
    """Returns `tiny_model` with Eagle 2's mixture, one folded SigLIP, and its connector."""
    return with_folded("siglip", Siglip, num_hidden_layers=1)


def tiny_internvl2() -> VisionLanguageModel:
    """Returns `tiny_model` with InternVL2's mixture, one folded InternViT that leaves out layers, and its MLP."""
    return with_folded("intern_vit", InternVit, num_hidden_layers=2, drop_path=0.4, layer_scale=0.5)


def with_folded(name: str, kind: type[VisionEncoder], **arguments: float) -> VisionLanguageModel:
    """Returns `tiny_model` with one encoder, each 2x2 of its features one token, and a projector with a norm."""
    model = tiny_model()  # seeds what follows
    model.mixture = ChannelConcat(encoders={name: kind(**SIZES, **arguments)}, fold={name: 2})
    model.projector = MlpProjector(model.mixture.channels, model.llm.config.hidden_size, layer_norm=True)
    return model


MODELS = {"eagle2": tiny_eagle2, "internvl2": tiny_internvl2, "qwen2_vl": tiny_qwen2_vl}


def rows(case: str, step: int) -> list[PackedBatch]:
    """Returns the two rows of a step; the more tiles, the longer the text, so that pieces of the loss differ too."""
    if case == "qwen2_vl":  # pictures of several sizes, a video among them
        return [
            qwen2_vl.row([qwen2_vl.sample(2 * step + rank, 4, *PICTURES[:tiles], 8 + 20 * tiles)])
            for rank, tiles in enumerate(TILES[step])
        ]
    return [
        tiny_row([tiny_sample(2 * step + rank, tiles=tiles, text=12 + 20 * tiles)])
        for rank, tiles in enumerate(TILES[step])
    ]


def run(engine: Engine, case: str, mine: list[int], steps: range) -> list[float]:
    """Takes steps on the rows `mine` of each; returns the gradient norms."""
    norms = []
    for step in steps:
        batches = rows(case, step)
        weight = sum(float(row.loss_weights.sum()) for row in batches)
        for place in mine:
            torch.manual_seed(2 * step + place)  # layers that are left out are those of the row, as in the trainer
            losses = engine.forward(batches[place]) * batches[place].loss_weights
            engine.backward(losses.sum() / weight, last=place == mine[-1])
        norms.append(engine.step(1.0)[1])
    return norms


def plain(case: str) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Returns gradient norms and final weights of plain torch on one rank."""
    model, stage = make(case)
    norms = run(PlainEngine(model, stage, 2), case, [0, 1], range(len(TILES)))
    return norms, model.state_dict()


def sharded(case: str, folder: Path, *, bf16: bool) -> dict:
    """Returns norms and final weights of ZeRO-3, uninterrupted and resumed; saves before the end in `folder`."""
    steps = range(len(TILES))
    settings = {"zero_stage": 3, "bf16": bf16, "persistence_threshold": 0, "prefetch_bucket_size": 1000}
    model, stage = make(case)
    engine = ZeroEngine(model, stage, 1, **settings)
    norms = run(engine, case, [dist.rank()], steps[:SAVED])
    engine.save(folder)
    norms += run(engine, case, [dist.rank()], steps[SAVED:])
    if dist.rank() == 0:
        (folder / "end").mkdir()
    dist.barrier()
    engine.save(folder / "end")
    engine.close()
    placement = engine.placement
    other, _ = make(case)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    engine = ZeroEngine(other, stage, 1, **settings)
    engine.load(folder)
    resumed = run(engine, case, [dist.rank()], steps[SAVED:])
    engine.close()
    placement.make_whole(model)
    engine.placement.make_whole(other)
    untouched, _ = make(case)
    pairs = list(zip(model.modules(), untouched.modules(), strict=True))
    return {
        "norms": norms,
        "resumed": norms[:SAVED] + resumed,
        "weights": model.state_dict(),
        "resumed_weights": other.state_dict(),
        "left_behind": sorted({name for used, new in pairs for name in vars(used).keys() - vars(new).keys()}),
        "containers": sorted({type(used._parameters).__name__ for used, _ in pairs}),
        "loss_of_both": [float(m.eval()(rows(case, 0)[0]).detach().sum()) for m in (model, other)],
    }


def main(out: Path) -> None:
    """Runs all cases."""
    dist.init(timeout_seconds=60)
    results = {}
    for name in [*RATES, "bf16"]:
        if dist.rank() == 0:
            (out / name).mkdir()
        dist.barrier()
        results[name] = sharded("trained" if name == "bf16" else name, out / name, bf16=name == "bf16")
    results["facts"] = facts()
    if dist.rank() == 0:
        torch.save(results, out / "results.pt")
    dist.shutdown()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
