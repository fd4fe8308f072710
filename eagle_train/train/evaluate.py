"""Held-out questions answered greedily, scored by exact match: as they are, and with less to see.

Less is: all images grey; the frames of videos in random order; fewer frames.
"""

from __future__ import annotations

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from eagle_train import dist
from eagle_train.data.chat import TextRun
from eagle_train.data.encode import Encoder
from eagle_train.data.loader import RowDataset
from eagle_train.model.generate import WHOLE, Access, Prompt, generate
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.track.console import progress
from eagle_train.train.scores import chance, scores
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
        num_frames: questions about videos are also asked with at most so many frames of each, one number at a time.
        whole_weights: every rank gets all weights, also where they were sharded; null: where there is room.
    """

    sources: Sequence[str]
    simple_types: Sequence[str]
    batch_size: int = 32
    max_new_tokens: int = 16
    gallery_per_type: int = 4
    num_frames: Sequence[int] = ()
    whole_weights: bool | None = None


@dataclass(frozen=True, slots=True)
class Question:
    """One held-out question with its tiles."""

    sample: Sample
    prompt: Prompt
    plans: tuple[MediaPlan, ...]

    @property
    def type(self) -> str:
        """Question type, the key accuracies are reported under."""
        return str(self.sample.meta.get("type", "all"))

    @property
    def answer(self) -> str:
        """The right answer, without spaces around it, as the model's are compared."""
        return "".join(part for part in self.sample.messages[-1].content if isinstance(part, str)).strip()

    @property
    def has_video(self) -> bool:
        """Whether it is about a video."""
        return any(medium.kind == "video" for medium in self.sample.media)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one held-out question."""

    question: Question
    said: dict[str, str]
    """The model's answers, by what it saw: `eval` is all, see `views`."""


def evaluate(
    model: VisionLanguageModel, dataset: RowDataset, evaluation: Evaluation, gallery: Path, access: Access = WHOLE
) -> dict[str, float]:
    """Returns `eval/exact_match/<type>`, the same of `eval_grey`, `eval_chance` and others; rank 0 writes the gallery.

    Those about videos are also asked with shuffled frames, `eval_shuffled`, and with n frames, `eval_frames_<n>`.
    Ranks share the questions; every rank returns the scores of all. Questions that cannot be read are counted in
    `eval/dropped`.

    Args:
        dataset: of the held-out samples; its shards are closed at the end.
        access: to the weights, see `served`.
    """
    catalog = dataset.catalog
    lengths = np.concatenate([catalog.sizes(shard).num_tokens for shard in range(len(catalog.shards))])
    order = [number for number in np.argsort(lengths, kind="stable").tolist() if lengths[number] > 0]
    mine = order[dist.rank() :: dist.world_size()]
    most = -(-len(order) // dist.world_size())  # of any rank: all take part in every batch, see `Access`
    facts: list[tuple[str, str, int | None, dict[str, str]]] = []
    shown: list[Outcome] = []  # the only ones whose tiles stay in memory
    taken: Counter[str] = Counter()
    training = model.training
    model.eval()
    with progress("evaluating held-out questions", len(mine)) as advance:
        for start in range(0, most, evaluation.batch_size):  # of like length: little padding
            numbers = mine[start : start + evaluation.batch_size]
            for outcome in ask(model, dataset, numbers, evaluation, access):
                question = outcome.question
                facts.append((question.type, question.answer, options(question), outcome.said))
                taken[question.type] += 1
                if dist.rank() == 0 and taken[question.type] <= evaluation.gallery_per_type:
                    shown.append(outcome)
            advance(len(numbers))
    model.train(training)
    dataset.close()
    if dist.rank() == 0:
        write_gallery(shown, dataset.encoder, gallery)
    facts = [fact for of_rank in dist.gather_objects(facts) for fact in of_rank]
    found = scores(chance([fact[:3] for fact in facts]), evaluation.simple_types, "eval_chance/exact_match")
    for view in sorted({view for *_, said in facts for view in said}):
        right = [(kind, float(said[view] == answer)) for kind, answer, _, said in facts if view in said]
        found |= scores(right, evaluation.simple_types, f"{view}/exact_match")
    return found | {"eval/dropped": float(len(catalog) - len(facts))}


def ask(
    model: VisionLanguageModel, dataset: RowDataset, numbers: Sequence[int], evaluation: Evaluation, access: Access
) -> list[Outcome]:
    """Returns the outcomes of the held-out samples `numbers` that can be read."""
    questions = read_questions(dataset, numbers)
    said: dict[int, dict[str, str]] = {number: {} for number in questions}
    for view, seen in views(dataset, questions, evaluation.num_frames).items():
        answers = answer(model, dataset.encoder, list(seen.values()), evaluation.max_new_tokens, access)
        for number, text in zip(seen, answers, strict=True):
            said[number][view] = text
    return [Outcome(question, said[number]) for number, question in questions.items()]


def views(
    dataset: RowDataset, questions: Mapping[int, Question], num_frames: Sequence[int]
) -> dict[str, dict[int, Question]]:
    """Returns what is asked, by the prefix of its metrics: the questions, and those with less to see."""
    about_videos = {number: question for number, question in questions.items() if question.has_video}
    found = {
        "eval": dict(questions),
        "eval_grey": {number: grey(question) for number, question in questions.items()},
        "eval_shuffled": {number: shuffled(question) for number, question in about_videos.items()},
    }
    for count in num_frames:
        found[f"eval_frames_{count}"] = read_questions(dataset, about_videos, count)
    return found


def read_questions(dataset: RowDataset, numbers: Iterable[int], max_frames: int | None = None) -> dict[int, Question]:
    """Returns those of the held-out samples `numbers` that can be read, see `read_question`.

    Fewer frames are others, not some of the same: one may be damaged where the question as it is can be read.
    """
    questions = {}
    for number in numbers:
        try:
            questions[number] = read_question(dataset, number, max_frames)
        except SampleError as error:
            log.warning("held-out sample left out: %s", error)
    return questions


def read_question(dataset: RowDataset, number: int, max_frames: int | None = None) -> Question:
    """Returns held-out sample `number` as a question: everything but its last answer.

    Args:
        max_frames: of each video; None: as many as its layout has.

    Raises:
        SampleError: if it cannot be read or decoded.
    """
    catalog, encoder = dataset.catalog, dataset.encoder
    layout = catalog.layout_of(number)
    plans = layout.media
    if max_frames is not None:
        kinds = [medium["kind"] for medium in catalog.index_row(*catalog.locate(number))["media"]]
        plans = tuple(
            replace(plan, num_frames=min(plan.num_frames, max_frames)) if kind == "video" else plan
            for plan, kind in zip(plans, kinds, strict=False)  # media of turns that were cut off are not laid out
        )
    sample, data = dataset.read(number, replace(layout, media=plans))  # of a list, only the chosen frames are read
    tiles = encoder.new_tiles(plans)
    encoder.decode_all(sample.key, sample.media, plans, data, tiles)
    return Question(sample, make_prompt(encoder, sample.messages[:-1], sample.media, plans, tiles), plans)


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
        tiles: of all media, (N, *tile_shape) uint8; N may be 0.
    """
    items: list[TextRun | int] = encoder.template.encode_prompt(messages, encoder.tokenizer)
    ids, _, positions = encoder.lay_out(items, media, plans)
    grids = encoder.grids(media, plans)
    counted = torch.from_numpy(encoder.positions(len(ids), positions, grids))
    return Prompt(ids.tolist(), positions.tolist(), torch.from_numpy(tiles), counted, grids)


def grey(question: Question) -> Question:
    """Returns the question with all its tiles grey."""
    return with_pixels(question, torch.full_like(question.prompt.pixels, GREY))


def shuffled(question: Question) -> Question:
    """Returns the question with the frames of each video in another order; labels stay where they are."""
    pieces = list(question.prompt.pixels.split([plan.num_tiles for plan in question.plans]))
    rng = random.Random(question.sample.key)
    for place, medium in enumerate(question.sample.media):
        if medium.kind == "video":
            steps = pieces[place].unflatten(0, (question.plans[place].num_steps, -1))
            order = list(range(len(steps)))
            rng.shuffle(order)
            pieces[place] = steps[order].flatten(0, 1)
    return with_pixels(question, torch.cat(pieces))


def with_pixels(question: Question, pixels: torch.Tensor) -> Question:
    """Returns the question with other tiles (N, *tile_shape) uint8."""
    return replace(question, prompt=replace(question.prompt, pixels=pixels))


def answer(
    model: VisionLanguageModel, encoder: Encoder, questions: Sequence[Question], max_new_tokens: int, access: Access
) -> list[str]:
    """Returns the model's greedy answers; a rank that has no question joins those that have, see `Access`."""
    prompts = [question.prompt for question in questions]
    if not (dist.all_reduce_sum([len(prompts)])[0] if access.together else prompts):
        return []
    positions = encoder.positions(1, np.zeros(0, dtype=np.int64), ())
    ids = generate(
        model,
        prompts or [Prompt([encoder.image_id], [], torch.empty(0), torch.from_numpy(positions))],
        max_new_tokens=max_new_tokens,
        stop_ids=encoder.template.stop_ids(encoder.tokenizer),
        pad_id=encoder.image_id,
        access=access,
    )
    return [encoder.tokenizer.decode(one, skip_special_tokens=True).strip() for one in ids[: len(questions)]]


def options(question: Question) -> int | None:
    """Returns how many answers a question names itself (`meta.num_options`), None if it names none."""
    return question.sample.meta.get("num_options")


def write_gallery(outcomes: Sequence[Outcome], encoder: Encoder, folder: Path) -> None:
    """Writes `gallery.json` and what questions show as PNGs."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, outcome in enumerate(outcomes):
        question = outcome.question
        names = []
        pieces = question.prompt.pixels.split([plan.num_tiles for plan in question.plans])
        seen = (encoder.tiling.views(piece.numpy(), plan) for piece, plan in zip(pieces, question.plans, strict=True))
        for place, view in enumerate(chain.from_iterable(seen)):
            names.append(f"{number:05d}-{place}.png")
            Image.fromarray(np.ascontiguousarray(view.transpose(1, 2, 0))).save(folder / names[-1])
        text = " ".join(p for m in question.sample.messages[:-1] for p in m.content if isinstance(p, str))
        entries.append(
            {
                "type": question.type,
                "question": text.strip(),
                "answer": question.answer,
                "prediction": outcome.said["eval"],
                "prediction_grey": outcome.said["eval_grey"],
                "images": names,
                "correct": outcome.said["eval"] == question.answer,
            }
        )
    (folder / "gallery.json").write_text(json.dumps(entries, indent=1, ensure_ascii=False))
