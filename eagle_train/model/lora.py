"""Low-rank adapters (peft) on the linear layers of a module: adding them, and merging them into its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from eagle_train.model.checkpoints.files import LazyWeights, shape_of

ADAPTER = "default"
"""The name that peft gives an adapter, part of its parameters' names."""
DOWN, UP, BASE = f".lora_A.{ADAPTER}.weight", f".lora_B.{ADAPTER}.weight", ".base_layer."
"""Ends, or parts, of the parameter names that peft makes of a layer's `weight`."""


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Adapters of one module: y = W x + (alpha / rank) B A dropout(x), with W frozen, A and B trained.

    B is zero at first, so that the module begins as it was.

    Args:
        rank: r; A is (r, inputs), B (outputs, r).
        alpha: scales what they add.
        dropout: of the inputs of A, in training.
        targets: names of linear layers in the module, or the last parts of their names: `q_proj`,
            `self_attn.q_proj`.

    Source: LoRA (arXiv 2106.09685).
    """

    rank: int
    alpha: float
    dropout: float
    targets: Sequence[str]

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank

    def config(self, **fields: Any) -> Any:
        """Returns peft's config.

        Raises:
            ValueError: if peft is not installed.
        """
        try:
            from peft import LoraConfig
        except ImportError as error:
            raise ValueError(f"lora needs peft: pip install 'eagle-train[lora]' ({error})") from error
        return LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules=list(self.targets),
            bias="none",
            **fields,
        )

    def add_to(self, name: str, module: nn.Module) -> None:
        """Puts adapters on the module's target layers; its parameters are frozen, those of the adapters are not.

        Args:
            name: of the module, for messages.

        Raises:
            ValueError: for a target that is no linear layer, or that names none; if peft is not installed.
        """
        config = self.config()
        from peft import inject_adapter_in_model

        for target in self.targets:
            # No other type: those whose weight is used past their forward, as by the loss or in torch's
            # MultiheadAttention, would leave the adapter out.
            found = {n: m for n, m in module.named_modules() if n == target or n.endswith(f".{target}")}
            if wrong := [n for n, m in found.items() if type(m) is not nn.Linear]:
                raise ValueError(
                    f"lora: {name}.{wrong[0]} is no linear layer; leave {target!r} out of lora.{name}.targets"
                )
            if not found:
                last = sorted({n.rpartition(".")[2] for n, m in module.named_modules() if type(m) is nn.Linear})
                raise ValueError(f"lora: no layer of {name} is called {target!r}; its linear layers are {last}")
        inject_adapter_in_model(config, module, adapter_name=ADAPTER)


def is_adapter(parameter: str) -> bool:
    """Returns whether a parameter's name is that of an adapter."""
    return parameter.endswith((DOWN, UP))


class MergedWeights(LazyWeights):
    """A model's weights by the names it has without adapters, with these added to them when one is asked for.

    Args:
        weights: by name, of a model with adapters.
        adapters: by the name of the module that has them.
        names: of the weights that count; None: all.
    """

    def __init__(
        self, weights: Mapping[str, torch.Tensor], adapters: Mapping[str, Lora], names: Iterable[str] | None = None
    ) -> None:
        self.weights = weights
        self.adapters = adapters
        self.source = {name.replace(BASE, "."): name for name in weights if not is_adapter(name)}
        self.names = list(self.source if names is None else names)

    @torch.no_grad()
    def __getitem__(self, name: str) -> torch.Tensor:
        """Returns a weight with its adapter, if it has one, added in float32 and rounded to its own dtype."""
        weight = self.weights[self.source[name]]
        layer, _, kind = self.source[name].rpartition(BASE)
        if not layer or kind != "weight":
            return weight
        scale = next(lora.scale for module, lora in self.adapters.items() if layer.startswith(f"{module}."))
        added = self.weights[layer + UP].float() @ self.weights[layer + DOWN].float()
        return (weight.float() + scale * added).to(weight.dtype)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a weight, which adapters do not change."""
        return shape_of(self.weights, self.source[name])

    def __iter__(self) -> Iterator[str]:
        """Yields the names."""
        return iter(self.names)

    def __len__(self) -> int:
        """Returns the number of weights."""
        return len(self.names)

    def only(self, names: Iterable[str]) -> MergedWeights:
        """Returns those of the weights that have one of these names."""
        wanted = set(names)
        return MergedWeights(self.weights, self.adapters, [name for name in self.names if name in wanted])


def write_adapter(out: Path, module: str, lora: Lora, weights: Mapping[str, torch.Tensor], base: str | None) -> None:
    """Writes the folder that peft's `PeftModel.from_pretrained` reads for a module alone, as for the LLM.

    Args:
        out: where there is nothing yet.
        module: whose adapters they are.
        weights: of the whole model, by name.
        base: hub id or folder of the weights that the adapters belong to; None: no LLM alone was published with them.
    """
    own = [name for name in weights if name.startswith(f"{module}.") and is_adapter(name)]
    tensors = {
        "base_model.model." + name.removeprefix(f"{module}.").replace(f".{ADAPTER}.", "."): weights[name].contiguous()
        for name in own
    }
    out.mkdir(parents=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = lora.config(task_type="CAUSAL_LM", base_model_name_or_path=base, inference_mode=True).to_dict()
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in fields.items()}
    (out / "adapter_config.json").write_text(json.dumps(fields, indent=2, sort_keys=True))
