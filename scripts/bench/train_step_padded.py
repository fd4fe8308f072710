"""A padded trainer as LLaVA's, on `transformers.Trainer`, for train_step.py; needs accelerate (peft brings it).

As LLaVA does it: a batch is padded to its longest sample, all its logits are made, a sample without an image brings a
black one that the encoders see (LLaVA, `train.py`: "image does not exist in the data, but the model is multimodal").
Two ways to group by length: transformers' (batches from 50 batches' worth of samples sorted by length) and LLaVA's
(images and texts apart, sorted by length within a batch of all ranks).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.utils.data import Dataset, Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from eagle_train.model.vlm import VisionLanguageModel, insert
from eagle_train.types import IGNORE_INDEX, EncodedSample

GROUPINGS = ("transformers", "llava")


class PaddedModel(nn.Module):
    """The same model for padded batches: LLaVA's forward pass."""

    def __init__(self, model: VisionLanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, labels, image_positions, pixels, kept) -> dict[str, torch.Tensor]:
        """Returns the mean loss of a batch.

        Args:
            input_ids, attention_mask, labels: (B, L); labels as LLaVA has them, shifted by the LLM.
            image_positions: (M,) places of visual tokens in the flat batch.
            pixels: (B', 3, S, S) uint8, black ones for samples without an image.
            kept: (B',) bool, which of the tiles enter.
        """
        model = self.model
        features = model.projector(model.mixture(pixels))
        flat = model.llm.get_input_embeddings()(input_ids).flatten(0, 1)
        flat = insert(flat, image_positions, features[kept].flatten(0, 1)) + 0.0 * features[~kept].sum().to(flat.dtype)
        embeddings = flat.unflatten(0, input_ids.shape)
        return {"loss": model.llm(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels).loss}


class Samples(Dataset):
    """Samples as the padded trainer reads them; labels stand on their own tokens, not before them."""

    def __init__(self, samples: Sequence[EncodedSample]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self.samples[index]
        labels = torch.cat([torch.tensor([IGNORE_INDEX]), sample.labels[:-1]])
        parts = {"labels": labels, "positions": sample.image_positions, "pixels": sample.pixels}
        return {"input_ids": sample.input_ids} | parts


def padded(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Returns a batch padded to its longest sample; tiles of one size, a black one where there is none."""
    longest = max(len(item["input_ids"]) for item in items)

    def pad(name: str, value: int) -> torch.Tensor:
        return torch.stack([nn.functional.pad(i[name], (0, longest - len(i[name])), value=value) for i in items])

    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    black = torch.zeros_like(items[0]["pixels"].new_empty(1, *items[0]["pixels"].shape[1:]))
    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", IGNORE_INDEX),
        "attention_mask": (torch.arange(longest) < lengths[:, None]).long(),
        "image_positions": torch.cat([item["positions"] + n * longest for n, item in enumerate(items)]),
        "pixels": torch.cat([item["pixels"] if len(item["pixels"]) else black for item in items]),
        "kept": torch.tensor([bool(len(i["pixels"])) for i in items for _ in range(max(1, len(i["pixels"])))]),
    }


class ModalityGrouped(Sampler):
    """LLaVA's `get_modality_length_grouped_indices` for one rank: batches of images or of texts, in random order."""

    def __init__(self, samples: Sequence[EncodedSample], batch_size: int) -> None:
        self.samples, self.batch_size = samples, batch_size

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        batches, rest = [], []
        for kind in (True, False):
            of_kind = [i for i, sample in enumerate(self.samples) if bool(len(sample.pixels)) == kind]
            order = [of_kind[i] for i in torch.randperm(len(of_kind), generator=generator)]
            parts = [order[i : i + self.batch_size] for i in range(0, len(order), self.batch_size)]
            batches += [part for part in parts if len(part) == self.batch_size]
            rest += [i for part in parts if len(part) < self.batch_size for i in part]
        shuffled = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        return iter([i for batch in shuffled for i in batch] + rest)


class LlavaTrainer(Trainer):
    """`transformers.Trainer` with LLaVA's order of samples."""

    def _get_train_sampler(self, train_dataset: Samples | None = None) -> Sampler:
        return ModalityGrouped((train_dataset or self.train_dataset).samples, self.args.per_device_train_batch_size)


class StepTimes(TrainerCallback):
    """Notes the time at the beginning and the end of training."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.seconds = now, 0.0

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self.seconds -= self.now()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.seconds += self.now()


def train_padded(
    model: VisionLanguageModel,
    samples: Sequence[EncodedSample],
    *,
    batch_size: int,
    grouping: str,
    now: Callable[[], float],
) -> float:
    """Returns the seconds of one epoch over the samples.

    Args:
        grouping: one of `GROUPINGS`.
        now: gives seconds.
    """
    attention = model.llm.config._attn_implementation
    model.llm.set_attn_implementation("sdpa")
    times = StepTimes(now)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1,
            learning_rate=1e-5,
            max_grad_norm=1.0,
            train_sampling_strategy="group_by_length" if grouping == "transformers" else "random",
            bf16=next(model.parameters()).device.type == "cuda",
            use_cpu=next(model.parameters()).device.type == "cpu",
            logging_steps=10,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        kind = Trainer if grouping == "transformers" else LlavaTrainer
        trainer = kind(PaddedModel(model), arguments, padded, Samples(samples), callbacks=[times])
        trainer.train()
    model.llm.set_attn_implementation(attention)
    return times.seconds
