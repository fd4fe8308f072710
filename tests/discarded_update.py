"""`python -m tests.discarded_update`: an update that is not to be changes neither weights nor moments."""

from __future__ import annotations

import math

import torch

from eagle_train.train.engine import PlainEngine
from eagle_train.train.optim import freeze
from eagle_train.train.zero.engine import ZeroEngine
from tests.engine_facts import ALL, SHARDED
from tests.toys import tiny_model, tiny_row, tiny_sample

OFFLOADED = {"offload_optimizer": True, "pin_memory": False, "cpu_adam": False}
ENGINES = {
    "plain": None,
    "zero1": {"zero_stage": 1, "bf16": False},
    "zero2": {"zero_stage": 2, "bf16": False},
    "zero3": SHARDED | {"bf16": False},
    "zero2-bf16": {"zero_stage": 2, "bf16": True},
    "zero3-bf16": SHARDED | {"bf16": True},
    "zero2-offload": {"zero_stage": 2, "bf16": False} | OFFLOADED,
    "zero1-bf16-offload": {"zero_stage": 1, "bf16": True} | OFFLOADED,
    "zero2-bf16-offload": {"zero_stage": 2, "bf16": True} | OFFLOADED,
    "zero3-bf16-offload": SHARDED | {"bf16": True} | OFFLOADED,
}


def weights(name: str, steps: list[str]) -> dict[str, torch.Tensor]:
    """Returns the weights after steps, each `sound`, `discarded` or `nan`."""
    model = tiny_model()
    freeze(model, ALL.learning_rates)
    settings = ENGINES[name]
    engine = PlainEngine(model, ALL, 1) if settings is None else ZeroEngine(model, ALL, 1, **settings)
    for number, step in enumerate(steps):
        row = tiny_row([tiny_sample(7 if step == "sound" else 50 + number, tiles=2)])
        loss = (engine.forward(row) * row.loss_weights).sum() / 100
        engine.backward(loss * math.nan if step == "nan" else loss, last=True)
        _, norm = engine.step(1.0, discard=step == "discarded")
        assert math.isfinite(norm) == (step != "nan"), norm
    engine.close()
    if settings is not None:
        engine.placement.make_whole(model)
    return {key: value.clone() for key, value in model.state_dict().items()}


def main() -> None:
    """Compares, engine by engine."""
    torch.set_num_threads(1)
    for name in ENGINES:
        start, expected = weights(name, []), weights(name, ["sound", "sound"])
        assert any(not torch.equal(start[key], expected[key]) for key in expected)
        for wrong in ("discarded", "nan"):
            found = weights(name, ["sound", wrong, "sound"])
            different = [key for key in expected if not torch.equal(found[key], expected[key])]
            assert not different, (name, wrong, different)
    print("the same")


if __name__ == "__main__":
    main()
