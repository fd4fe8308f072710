"""Elastic, exact resume: any split of a run over ranks and workers gives the bytes of the run that was not stopped."""

import hashlib
import random
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from eagle_train.data.balance import CostModel
from eagle_train.data.degrade import AutomaticDegradeSampling, EachByItself
from eagle_train.data.encode import Encoder
from eagle_train.data.frames import FrameRate
from eagle_train.data.images import ImageReader
from eagle_train.data.loader import RowDataset
from eagle_train.data.loss_weights import square_root
from eagle_train.data.plan import PlanConfig
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.row_buffers import row_bytes
from eagle_train.data.step_loader import StepLoader
from eagle_train.data.stream import Cursor, steps
from eagle_train.data.tile_grids import ImageAreaPreservation
from eagle_train.data.tiling import PadToSquare
from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.assemble import load_tokenizer
from eagle_train.train.config import build, load_choice
from tests.catalogs import read_catalog

COST = CostModel(per_token=1e6, per_token_squared=1e3, per_tile=5e6)
# Two stages of one run, each another mixture in rows of another length, the second under Automatic Degrade Sampling;
# step counts go through several epochs.
STAGES = (
    {"max_length": 256, "rows_per_step": 5, "window_rows": 8, "repeats": (1, 1, 2, 1, "0.5"), "num_epochs": None},
    {"max_length": 60, "rows_per_step": 6, "window_rows": 5, "repeats": ("0.3", 1, 1, 3, 0), "num_epochs": 2},
)
NUM_STEPS = (16, None)


@dataclass(frozen=True, repr=False)
class Stage:
    """What a stage's rows come from."""

    dataset: RowDataset
    plan: PlanConfig
    end: int | None


@pytest.fixture(scope="module")
def stages(data):
    encoder = Encoder(
        template=build(load_choice("chat_template", "toy")),
        tokenizer=load_tokenizer(str(data / "tokenizer")),
        images=ImageReader(),
        videos=PyAvVideo(),
        tiling=PadToSquare(),
        degrade=EachByItself(frames=FrameRate(max_frames=4)),
        tile_size=16,
        tokens_per_tile=4,
        loss_weight=square_root,
    )
    ads = AutomaticDegradeSampling(frames=FrameRate(fps=8.0, min_frames=2, max_frames=64))
    degrading = replace(encoder, tiling=ImageAreaPreservation(tile_size=16), degrade=ads)
    sources = recipe_sources(load_recipe(str(data / "small.yaml")), data)
    made = []
    for values, end, encodes in zip(STAGES, NUM_STEPS, (encoder, degrading), strict=True):
        catalog = read_catalog(sources, encodes, values["max_length"])
        repeats = tuple(Fraction(str(repeat)) for repeat in values["repeats"])
        plan = PlanConfig(**values | {"repeats": repeats, "cost": COST, "seed": 3})
        made.append(Stage(RowDataset(catalog, encodes), plan, end))
    return made


def digest(row) -> str:
    """SHA-256 of everything a row holds."""
    hashes = hashlib.sha256()
    for name in row.__slots__:
        value = getattr(row, name)
        content = value.numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        hashes.update(name.encode() + content)
    return hashes.hexdigest()


def segment(stage, first, end, cursor, ranks, workers):
    """Runs steps `first` to `end` on some ranks; returns the digest of each row in order, and the cursor after them."""
    found, after = {}, cursor
    micro_batches = -(-stage.plan.rows_per_step // ranks)
    for rank in range(ranks):
        loader = StepLoader(
            dataset=stage.dataset,
            steps=steps(stage.dataset.catalog, stage.plan, first=first, end=end, cursor=cursor),
            rank=rank,
            world_size=ranks,
            micro_batches=micro_batches,
            row_bytes=row_bytes(stage.plan.max_length, 4, 16) if rank % 2 == 0 else 0,  # both ways to hand rows over
            num_workers=workers if rank == 0 else 0,  # one rank with workers shows what workers do
        )
        for step, rows in loader:
            assert len(rows) == micro_batches
            for row in rows:
                if row.row < 0:
                    assert row.loss_weights.sum() == 0 and row.num_tokens == 0
                else:
                    assert row.row not in found, "no row comes twice"
                    found[row.row] = digest(row)
            after = step.after
    assert sorted(found) == list(range(min(found), max(found) + 1)), "no row is left out"
    return [found[number] for number in sorted(found)], after


@pytest.fixture(scope="module")
def whole(stages):
    """The rows of both stages on one rank, not stopped."""
    return [segment(stage, 0, stage.end, None, 1, 0)[0] for stage in stages]


def test_the_run_has_epochs_images_and_windows_enough_to_mean_something(stages, whole):
    last = [list(steps(s.dataset.catalog, s.plan, end=s.end))[-1].after for s in stages]
    assert last[0].epoch >= 1 and last[1].epoch == 1 and max(place.window for place in last) >= 1
    assert len(whole[0]) == 80 and len(whole[1]) > 12
    assert len(set(whole[0] + whole[1])) == len(whole[0] + whole[1])


def test_the_second_stage_has_samples_that_get_less_than_they_ask_for(stages):
    tight = stages[1].dataset.catalog
    ample = read_catalog(tight.sources, stages[1].dataset.encoder, 4096)
    layouts = [(tight.layout_of(number), ample.layout_of(number)) for number in range(len(tight))]
    used = [(here, there) for here, there in layouts if here.num_tokens]
    assert len(used) > len(layouts) / 2
    assert sum(here.num_frames < there.num_frames for here, there in used) > 3
    assert sum(here.num_tiles < there.num_tiles for here, there in used) > 20


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than this machine has cores
@pytest.mark.parametrize("seed", range(16))
def test_any_split_gives_the_rows_of_the_undisturbed_run(stages, whole, seed):
    draw = random.Random(seed)
    cuts = sorted(draw.sample(range(1, 16), draw.randrange(4)))
    for stage, expected in zip(stages, whole, strict=True):
        size = stage.plan.rows_per_step
        num_steps = -(-len(expected) // size)
        borders = [0, *(cut for cut in cuts if cut < num_steps), num_steps]
        found, state = [], {}
        for first, end in pairwise(borders):
            cursor = Cursor(**state) if first else None
            rows, cursor = segment(stage, first, end, cursor, draw.randint(1, 7), draw.randint(0, 4))
            found += rows
            state = {name: getattr(cursor, name) for name in cursor.__slots__}  # all that a checkpoint keeps of it
            assert all(isinstance(value, int) for value in state.values())
        assert found == expected
