"""What engines do with memory, masters and freezing, as `tests/zero_ranks.py` finds it on two ranks."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from eagle_train import dist
from eagle_train.train.engine import Engine, PlainEngine
from eagle_train.train.freeze_proof import FreezeProof
from eagle_train.train.optim import freeze
from eagle_train.train.pieces import check_complete
from eagle_train.train.schedule import Stage
from eagle_train.train.zero.engine import ZeroEngine
from eagle_train.train.zero.masters import keep_masters
from tests.toys import tiny_model, tiny_row, tiny_sample

STAGE = Stage(
    recipe="x",
    learning_rates={"mixture": None, "projector": 1e-2, "llm": None},
    max_length=256,
    rows_per_step=2,
    num_steps=1,
)
ONLY_LLM = replace(STAGE, learning_rates={"mixture": None, "projector": None, "llm": 1e-2})
ONLY_VIT = replace(
    STAGE, learning_rates={"mixture": None, "mixture.encoders.vit": 1e-2, "projector": None, "llm": None}
)
COSTS = {"projector": STAGE, "llm": ONLY_LLM, "vit": ONLY_VIT}
ALL = replace(STAGE, learning_rates={"mixture": 1e-2, "projector": 1e-2, "llm": 1e-2})
SHARDED = {"zero_stage": 3, "persistence_threshold": 0}
ENGINES = {"plain": None, "zero2": {"zero_stage": 2}, "zero3": SHARDED}
BF16 = {"zero2": {"zero_stage": 2}, "zero2 on host": {"zero_stage": 2, "offload_optimizer": True}, "zero3": SHARDED}
BF16 |= {"zero3 on host": SHARDED | {"offload_optimizer": True, "offload_param": True}}


def make_engine(name: str, model: nn.Module, stage: Stage) -> Engine:
    """Returns an engine in float32."""
    freeze(model, stage.learning_rates)
    settings = ENGINES[name]
    return PlainEngine(model, stage, 1) if settings is None else ZeroEngine(model, stage, 1, bf16=False, **settings)


def train(engine: Engine, scale: float = 1.0) -> None:
    """Takes a step on this rank's row."""
    row = tiny_row([tiny_sample(dist.rank(), tiles=2)])
    engine.backward((engine.forward(row) * row.loss_weights).sum() / 100, last=True)
    engine.step(scale)


def frozen_costs(name: str, stage: Stage) -> dict[str, object]:
    """Returns what the frozen modules of a stage cost under an engine.

    Of each part of the model, the bytes that autograd keeps of its forward pass; names of frozen parameters that
    got a gradient; and how many elements the optimizer's first moments have, over all ranks.
    """
    model = tiny_model()
    engine = make_engine(name, model, stage)
    inside: list[str] = []
    parts = {"mixture": model.mixture, "projector": model.projector, "llm": model.llm.model}
    parts |= dict(model.mixture.encoders.items())
    kept = dict.fromkeys(parts, 0)
    hooks = []
    for part, module in parts.items():
        hooks.append(module.register_forward_pre_hook(lambda *_, part=part: inside.append(part)))
        hooks.append(module.register_forward_hook(lambda *_: inside.pop() and None))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if inside:
            kept[inside[-1]] += tensor.nbytes
        return tensor

    row = tiny_row([tiny_sample(dist.rank(), tiles=2)])
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = engine.forward(row)
    engine.backward((losses * row.loss_weights).sum() / 100, last=True)
    touched = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    engine.step(1.0)
    for hook in hooks:
        hook.remove()
    optimizer = engine.optimizer if name == "plain" else engine.optimizer.optimizer
    moments = sum(state["exp_avg"].numel() for state in optimizer.state.values())
    engine.close()
    return {"kept": kept, "touched": touched, "moments": dist.all_reduce_sum([moments])[0]}


def masters_of(model: nn.Module) -> list[torch.Tensor]:
    """Returns this rank's shares of the master weights."""
    kept: dict[nn.Parameter, torch.Tensor] = {}
    keep_masters(model, kept)
    return list(kept.values())


def masters(settings: dict) -> dict[str, object]:
    """Returns what becomes of master weights under bfloat16: by small updates, and from a stage to the next."""
    model = tiny_model()
    freeze(model, ALL.learning_rates)
    small = replace(ALL, learning_rates=dict.fromkeys(ALL.learning_rates, 1e-6), max_grad_norm=None)
    engine = ZeroEngine(model, small, 1, bf16=True, pin_memory=False, **settings)
    weights = {name: engine.placement.local(p).clone() for name, p in model.named_parameters()}
    before = masters_of(model)
    train(engine)
    after = masters_of(model)
    still = [torch.equal(weights[name], engine.placement.local(p)) for name, p in model.named_parameters()]
    engine.close()
    freeze(model, ONLY_LLM.learning_rates)
    engine = ZeroEngine(model, ONLY_LLM, 1, bf16=True, pin_memory=False, placement=engine.placement, **settings)
    carried = masters_of(model)
    expected = [share for share, p in zip(after, model.parameters(), strict=True) if p.requires_grad]
    engine.close()
    return {
        "dtypes": sorted({str(share.dtype) for share in before}),
        "weights": sorted({str(weight.dtype) for weight in weights.values()}),
        "moved": sum(int((a != b).sum()) for a, b in zip(before, after, strict=True)),
        "largest": max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)),
        "unmoved_weights": sum(still) / len(still),
        "carried": all(torch.equal(a, b) for a, b in zip(expected, carried, strict=True)) and len(carried) > 0,
        "beyond_bf16": sum(int((share != share.bfloat16().float()).sum()) for share in carried),
    }


def shards_between_stages() -> dict[str, int]:
    """Returns how many elements of the largest parameter a rank holds after ZeRO-3 is closed, and it has."""
    model = tiny_model()
    engine = make_engine("zero3", model, ALL)
    sizes = {name: parameter.ds_numel for name, parameter in model.named_parameters()}
    train(engine)
    engine.close()
    largest = max(sizes, key=sizes.__getitem__)
    parameter = dict(model.named_parameters())[largest]
    return {"whole": sizes[largest], "part": engine.placement.local(parameter).numel(), "seen": parameter.numel()}


def held_after_collection(name: str) -> str:
    """Returns what is missing in a stage's state once the engine of the stage before has been collected."""
    model = tiny_model()
    first = make_engine(name, model, STAGE)
    train(first)
    first.close()
    freeze(model, ALL.learning_rates)
    second = ZeroEngine(model, ALL, 1, bf16=False, placement=first.placement, **ENGINES[name])
    first = None
    gc.collect()
    train(second)
    try:
        check_complete(second.pieces(), model)
        said = ""
    except RuntimeError as error:
        said = str(error)
    second.close()
    return said


def refuted(name: str, spoil: Callable[[nn.Module, Engine], None]) -> str:
    """Returns what the proof of freezing says after a rank has spoilt something between its start and the update."""
    model = tiny_model()
    engine = make_engine(name, model, STAGE)
    proof = FreezeProof(model, engine.placement)
    train(engine)
    if dist.rank() == dist.world_size() - 1:
        spoil(model, engine)
    try:
        said = str(proof.check())
    except ValueError as error:
        said = str(error)
    engine.close()
    return said


def move_one_frozen(model: nn.Module, engine: Engine) -> None:
    """Changes one element of what this rank has of one frozen weight, by the least possible."""
    local = engine.placement.local(model.llm.model.norm.weight)
    local.view(-1)[-1] = torch.nextafter(local.view(-1)[-1], torch.tensor(9.0))


def facts() -> dict[str, object]:
    """Returns all of it; all ranks call it."""
    return {
        "costs": {f"{name} {part}": frozen_costs(name, stage) for name in ENGINES for part, stage in COSTS.items()},
        "masters": {name: masters(settings) for name, settings in BF16.items()},
        "shards": shards_between_stages(),
        "lost": {name: held_after_collection(name) for name in ("zero2", "zero3")},
        "refuted": {name: refuted(name, move_one_frozen) for name in ENGINES},
    }
