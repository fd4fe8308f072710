"""Held-out questions answered greedily, scored by exact match, with the images and with grey ones."""

from __future__ import annotations

import json
import logging
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eagle_train import dist
from eagle_train.data.catalog import Catalog
from eagle_train.data.chat import TextRun
from eagle_train.data.encode import Encoder
from eagle_train.data.loader import RowDataset
from eagle_train.model.generate import Prompt, generate
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.console import progress
from eagle_train.types import Media, MediaPlan, Message, Sample, SampleError

log = logging.getLogger(__name__)

GREY = 128


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is evaluated at the end of a run.

    Args:
        sources: held-out sources of the last stage's recipe; each sample is one question whose
            `meta.type` names its question type.
        simple_types: types whose average is `exact_match/simple`.
        batch_size: questions answered at once.
        max_new_tokens: length of an answer at most.
        gallery_per_type: questions per type written, with their images, for the report.
    """

    sources: Sequence[str]
    simple_types: Sequence[str]
    batch_size: int = 32
    max_new_tokens: int = 16
    gallery_per_type: int = 4


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out question with its tiles."""

    sample: Sample
    prompt: Prompt

    @property
    def type(self) -> str:
        """Question type, the key accuracies are reported under."""
        return str(self.sample.meta.get("type", "all"))

    @property
    def answer(self) -> str:
        """The right answer."""
        return "".join(part for part in self.sample.messages[-1].content if isinstance(part, str))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one held-out question."""

    question: Question
    said: str
    """The model's answer."""
    blind: str
    """Its answer with all images grey."""


def evaluate(
    model: VisionLanguageModel, catalog: Catalog, encoder: Encoder, evaluation: Evaluation, gallery: Path
) -> dict[str, float]:
    """Returns `eval/exact_match/<type>`, `eval_grey/...` and `eval_chance/...`; rank 0 writes the gallery.

    Ranks share the questions; every rank returns the scores of all. Chance is what always giving the
    commonest answer of a type would score. Questions that cannot be read are counted in `eval/dropped`.
    """
    lengths = np.concatenate([catalog.sizes(shard).num_tokens for shard in range(len(catalog.shards))])
    order = [number for number in np.argsort(lengths, kind="stable").tolist() if lengths[number] > 0]
    mine = order[dist.rank() :: dist.world_size()]
    dataset = RowDataset(catalog, encoder)
    outcomes: list[Outcome] = []
    training = model.training
    model.eval()
    with progress("evaluating held-out questions", len(mine)) as advance:
        for start in range(0, len(mine), evaluation.batch_size):  # of like length: little padding
            numbers = mine[start : start + evaluation.batch_size]
            outcomes += ask(model, encoder, dataset, numbers, evaluation.max_new_tokens)
            advance(len(numbers))
    model.train(training)
    dataset.close()
    if dist.rank() == 0:
        write_gallery(outcomes, gallery, evaluation.gallery_per_type)
    facts = [(o.question.type, o.question.answer, o.said, o.blind) for o in outcomes]
    facts = [fact for of_rank in dist.gather_objects(facts) for fact in of_rank]
    simple = evaluation.simple_types
    return (
        scores([(kind, float(said == answer)) for kind, answer, said, _ in facts], simple, "eval/exact_match")
        | scores([(kind, float(blind == answer)) for kind, answer, _, blind in facts], simple, "eval_grey/exact_match")
        | scores(chance([(kind, answer) for kind, answer, _, _ in facts]), simple, "eval_chance/exact_match")
        | {"eval/dropped": float(len(catalog) - len(facts))}
    )


def ask(
    model: VisionLanguageModel, encoder: Encoder, dataset: RowDataset, numbers: Sequence[int], max_new_tokens: int
) -> list[Outcome]:
    """Returns the outcomes of the held-out samples `numbers` that can be read."""
    questions = []
    for number in numbers:
        try:
            questions.append(read_question(dataset, number))
        except SampleError as error:
            log.warning("held-out sample left out: %s", error)
    if not questions:
        return []
    said = answer(model, encoder, questions, max_new_tokens)
    blind = answer(model, encoder, [grey(question) for question in questions], max_new_tokens)
    return [Outcome(*triple) for triple in zip(questions, said, blind, strict=True)]


def read_question(dataset: RowDataset, number: int) -> Question:
    """Returns held-out sample `number` as a question: everything but its last answer."""
    shard, index = dataset.catalog.locate(number)
    layout = dataset.catalog.sizes(shard).layout(index)
    sample, data = dataset.read(number, layout)
    tiles = dataset.encoder.new_tiles(layout.media)
    dataset.encoder.decode_all(sample.key, sample.media, layout.media, data, tiles)
    return Question(sample, make_prompt(dataset.encoder, sample.messages[:-1], sample.media, layout.media, tiles))


def make_prompt(
    encoder: Encoder,
    messages: Sequence[Message],
    media: Sequence[Media],
    plans: Sequence[MediaPlan],
    tiles: np.ndarray,
) -> Prompt:
    """Returns a conversation that ends with a user turn as a prompt.

    Args:
        media: header facts, in reading order.
        plans: frames and tiles of each medium.
        tiles: of all media, (N, 3, S, S) uint8; N may be 0.
    """
    items: list[TextRun | int] = encoder.template.encode_prompt(messages, encoder.tokenizer)
    ids, _, positions = encoder.lay_out(items, media, plans)
    return Prompt(ids.tolist(), positions.tolist(), torch.from_numpy(tiles))


def grey(question: Question) -> Question:
    """Returns the question with all its tiles grey."""
    prompt = question.prompt
    blank = torch.full_like(prompt.pixels, GREY)
    return Question(question.sample, Prompt(prompt.input_ids, prompt.image_positions, blank))


def answer(
    model: VisionLanguageModel, encoder: Encoder, questions: Sequence[Question], max_new_tokens: int
) -> list[str]:
    """Returns the model's greedy answers."""
    ids = generate(
        model,
        [question.prompt for question in questions],
        max_new_tokens=max_new_tokens,
        stop_ids=encoder.template.stop_ids(encoder.tokenizer),
        pad_id=encoder.image_id,
    )
    return [encoder.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids]


def chance(answers: Sequence[tuple[str, str]]) -> list[tuple[str, float]]:
    """Returns, per question type, the share of its commonest answer among (type, answer) pairs."""
    by_type: Mapping[str, Counter[str]] = defaultdict(Counter)
    for kind, right in answers:
        by_type[kind][right] += 1
    return [(kind, max(counts.values()) / counts.total()) for kind, counts in by_type.items()]


def scores(right: Sequence[tuple[str, float]], simple: Sequence[str], prefix: str) -> dict[str, float]:
    """Returns the mean per type, and the average of the simple types' means."""
    by_type: dict[str, list[float]] = defaultdict(list)
    for kind, value in right:
        by_type[kind].append(value)
    means = {kind: sum(values) / len(values) for kind, values in sorted(by_type.items())}
    known = [means[kind] for kind in simple if kind in means]
    overall = {f"{prefix}/simple": sum(known) / len(known)} if known else {}
    return {f"{prefix}/{kind}": mean for kind, mean in means.items()} | overall


def write_gallery(outcomes: Sequence[Outcome], folder: Path, per_type: int) -> None:
    """Writes `gallery.json` and the tiles of the first `per_type` questions of each type as PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    entries, taken = [], Counter()
    for number, outcome in enumerate(outcomes):
        question = outcome.question
        taken[question.type] += 1
        if taken[question.type] > per_type:
            continue
        names = []
        for place, tile in enumerate(question.prompt.pixels):
            names.append(f"{number:05d}-{place}.png")
            Image.fromarray(tile.permute(1, 2, 0).numpy()).save(folder / names[-1])
        text = " ".join(p for m in question.sample.messages[:-1] for p in m.content if isinstance(p, str))
        entries.append(
            {
                "type": question.type,
                "question": text.strip(),
                "answer": question.answer,
                "prediction": outcome.said,
                "prediction_grey": outcome.blind,
                "images": names,
                "correct": outcome.said == question.answer,
            }
        )
    (folder / "gallery.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False))
