"""Stages and the learning rate as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from eagle_train.data.chat import ChatTemplate
from eagle_train.data.degrade import Degrade
from eagle_train.data.tiling import Tiling


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One stage of the schedule: its data, its length, and what is trained at which rate.

    Args:
        recipe: name of a recipe under `data_recipes/`, or a path to one.
        learning_rates: peak learning rate by module name; the longest matching prefix counts, null
            freezes. Every parameter must be matched.
        max_length: tokens of a row.
        rows_per_step: global batch in rows, over all ranks and micro-batches.
        tokens_per_step: global batch in tokens instead, a multiple of `max_length`; exactly one of the two is given.
        num_steps: optimizer steps; null: as many as `num_epochs` needs.
        num_epochs: passes over the recipe; exactly one of the two is given.
        warmup_ratio: share of the steps with linear warm-up.
        warmup_steps: how many they are, instead of the share.
        min_lr_ratio: end of the cosine, as a share of the peak.
        weight_decay: of matrices, one for all or by module name, the longest prefix counts; norms and biases have
            none.
        betas, eps: of AdamW.
        max_grad_norm: global gradient norm is clipped to it, above 0; null: not clipped.
        seed: of the plan's shuffles, and of the aligner's weights.
        chat_template, tiling, degrade: of this stage; null: those of the run, which its evaluation and its exports,
            so `chat` too, have in any case.
        align: name of the one encoder that sees, through a projector of its own named `aligner`, which is thrown
            away when the stage ends (see `PreAlignment`); null: the whole mixture and its projector see.
    """

    recipe: str
    learning_rates: Mapping[str, float | None]
    max_length: int
    rows_per_step: int | None = None
    tokens_per_step: int | None = None
    num_steps: int | None = None
    num_epochs: int | None = None
    warmup_ratio: float = 0.03
    warmup_steps: int | None = None
    min_lr_ratio: float = 0.0
    weight_decay: float | Mapping[str, float] = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float | None = 1.0
    seed: int = 0
    chat_template: ChatTemplate | None = None
    tiling: Tiling | None = None
    degrade: Degrade | None = None
    align: str | None = None

    def __post_init__(self) -> None:
        if (self.num_steps is None) == (self.num_epochs is None):
            raise ValueError(f"give num_steps ({self.num_steps}) or num_epochs ({self.num_epochs}), not both")
        if (self.rows_per_step is None) == (self.tokens_per_step is None):
            both = f"rows_per_step ({self.rows_per_step}) or tokens_per_step ({self.tokens_per_step})"
            raise ValueError(f"give {both}, not both; set the other to null")
        if self.rows_per_step is None:
            rows, rest = divmod(self.tokens_per_step, self.max_length)
            if rest:
                near = max(1, round(self.tokens_per_step / self.max_length)) * self.max_length
                raise ValueError(
                    f"tokens_per_step {self.tokens_per_step} is no multiple of max_length {self.max_length}; "
                    f"the nearest is {near}"
                )
            object.__setattr__(self, "rows_per_step", rows)  # rows of a plan are full, so a step is a number of rows
        if self.rows_per_step < 1 or self.max_length < 2:
            raise ValueError(f"rows_per_step {self.rows_per_step} and max_length {self.max_length} are too small")
        if self.max_grad_norm is not None and self.max_grad_norm <= 0:
            raise ValueError(f"max_grad_norm is {self.max_grad_norm}; give one above 0, or null for no clipping")
        if not (0 <= self.warmup_ratio <= 1 and 0 <= self.min_lr_ratio <= 1 and (self.warmup_steps or 0) >= 0):
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio} and min_lr_ratio {self.min_lr_ratio} are shares, from 0 to 1; "
                f"warmup_steps {self.warmup_steps} a number of steps, from 0"
            )
        if self.align is not None:
            self.check_aligned()

    def num_warmup_steps(self, num_steps: int) -> int:
        """Returns how many of the stage's `num_steps` are linear warm-up."""
        return math.ceil(self.warmup_ratio * num_steps) if self.warmup_steps is None else self.warmup_steps

    def row_seed(self, row: int) -> int:
        """Returns what seeds the noise in a row's forward pass (drop path): its own, whatever rank runs it and when.

        Args:
            row: its number in the stage; -1 for an empty one.
        """
        return (self.seed << 40) + row + 1

    def check_aligned(self) -> None:
        """Raises ValueError if a stage that aligns one encoder would train what it does not run."""
        runs = (f"mixture.encoders.{self.align}", "aligner", "llm")
        trained = [name for name, rate in self.learning_rates.items() if rate is not None]
        idle = [name for name in trained if not any(name == part or name.startswith(f"{part}.") for part in runs)]
        if idle:
            raise ValueError(f"a stage with align={self.align} runs {', '.join(runs)} alone; set {idle} to null")


def lr_scale(step: int, num_steps: int, warmup: int, min_lr_ratio: float) -> float:
    """Returns the factor on the peak learning rate in `step` (0-based) of `num_steps`.

    Linear warm-up over `warmup` steps, then a cosine that would reach `min_lr_ratio` at step `num_steps`.
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    return min_lr_ratio + (1.0 - min_lr_ratio) * 0.5 * (1.0 + math.cos(math.pi * progress))
