"""The freeze table of a stage, proven by its first update: what is frozen stays, what is trained gets a gradient."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from eagle_train import dist
from eagle_train.train.placement import Placement

CHUNK = 1 << 22
"""Elements hashed at a time, which are 8 bytes each then."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element."""
NAMED = 6
"""Parameters of each kind that an error names."""


class FreezeError(ValueError):
    """The first update of a stage did not do what its learning rates say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proven:
    """What a proof has found, in tensors."""

    frozen: int
    trained: int
    zero: tuple[str, ...]
    """Trained ones whose gradient was zero throughout: right where a layer before them starts from zero."""

    def __str__(self) -> str:
        zero = f" ({len(self.zero)} of them zero: {shortened(self.zero)})" if self.zero else ""
        return f"{self.frozen} frozen tensors unchanged, {self.trained} trained ones with finite gradients{zero}"


class FreezeProof:
    """Watches a model from now to its next update.

    It costs one reading of the frozen weights before and one after, each rank of its part, and one of every
    gradient; nothing is gathered.

    Args:
        model: whose parameters ask for gradients or not.
        placement: where its weights lie.
    """

    def __init__(self, model: nn.Module, placement: Placement) -> None:
        self.placement = placement
        self.frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.before = self.checksums()
        # By name, of all gradients so far: whether one was not finite, whether one was not zero.
        self.seen: dict[str, torch.Tensor] = {}
        self.hooks = [p.register_hook(partial(self.see, name)) for name, p in self.trained.items()]

    def checksums(self) -> dict[str, torch.Tensor]:
        """Returns the checksum of what this rank has of each frozen parameter."""
        return {name: checksum(self.placement.local(p)) for name, p in self.frozen.items()}

    def see(self, name: str, gradient: torch.Tensor) -> None:
        """Takes a gradient down; nothing waits for the device."""
        facts = torch.stack([~gradient.isfinite().all(), gradient.any()])
        self.seen[name] = self.seen[name] | facts if name in self.seen else facts

    def forget(self) -> None:
        """Forgets gradients that no update was made of."""
        self.seen.clear()

    def close(self) -> None:
        """Watches no longer."""
        for hook in self.hooks:
            hook.remove()

    def check(self) -> Proven:
        """Returns what was found, after the update; all ranks call it.

        Raises:
            FreezeError: naming the parameters, and what to do.
        """
        self.close()
        after = self.checksums()
        changed = [float(not torch.equal(self.before[name], after[name])) for name in self.frozen]
        facts = [[1.0, *self.seen[name].tolist()] if name in self.seen else [0.0] * 3 for name in self.trained]
        counts = dist.all_reduce_sum([*changed, *(value for three in facts for value in three)])
        gradients = torch.tensor(counts[len(changed) :]).view(-1, 3)  # of each: ranks that had one, bad, not zero
        moved = [name for name, count in zip(self.frozen, counts, strict=False) if count]
        missing, bad, zero = (
            [name for name, hit in zip(self.trained, hits.tolist(), strict=True) if hit]
            for hits in (gradients[:, 0] == 0, gradients[:, 1] > 0, (gradients[:, 0] > 0) & (gradients[:, 2] == 0))
        )
        faults = {
            "frozen but changed by the update, which is a fault of this program": moved,
            "trained but without a gradient; freeze them, for example learning_rates.<name>=null, if the model "
            "does not use them": missing,
            "trained but with a gradient that is not finite; lower the learning rate or look at the data": bad,
        }
        if any(faults.values()):
            told = "; ".join(f"{len(names)} {what}: {shortened(names)}" for what, names in faults.items() if names)
            raise FreezeError(f"the freeze table does not hold ({told}). prove_freeze=false leaves this check out")
        return Proven(frozen=len(self.frozen), trained=len(self.trained), zero=tuple(zero))


@torch.no_grad()
def checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Returns (2,) int64, on the tensor's device: sums of its bits as integers, plain and weighted by position."""
    bits = tensor.detach().contiguous().view(-1).view(INTEGERS[tensor.element_size()])
    total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
    for number, some in enumerate(bits.split(CHUNK)):
        wide = some.long()
        places = torch.arange(1, len(wide) + 1, device=wide.device) + number * CHUNK
        total += torch.stack([wide.sum(), (wide * places).sum()])  # wraps around: a hash may
    return total


def shortened(names: tuple[str, ...] | list[str]) -> str:
    """Returns the first few names."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
