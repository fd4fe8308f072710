"""Our loader in the benchmark: index, catalog, plan and loader as `train.stage_data` and `train.app` wire them."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

from loader_data import Paths
from loader_work import Task

from eagle_train.data.balance import CostModel
from eagle_train.data.catalog import Source
from eagle_train.data.layout import ensure_layout
from eagle_train.data.loader import RowDataset
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.plan import PlanConfig
from eagle_train.data.row_buffers import row_bytes
from eagle_train.data.step_loader import StepLoader
from eagle_train.data.stream import steps
from eagle_train.data.too_long import DropTooLong
from eagle_train.train.stage_data import make_layout

COST = CostModel(per_token=1e9)


def ours(task: Task, rows_per_step: int = 1) -> Iterator[int]:
    """Yields the samples of each step of one rank."""
    encoder = task.make_encoder()
    source = Source(name="bench", shards=Paths(task.root).tars())
    layout = make_layout(encoder, task.max_length, DropTooLong())
    for shard in source.shards:
        ensure_layout(shard, None, source.name, layout)
    catalog = open_catalog([source], layout.fingerprint)
    plan = PlanConfig(
        max_length=task.max_length,
        rows_per_step=rows_per_step,
        window_rows=4096,
        repeats=(Fraction(1),),
        num_epochs=-(-task.num_samples // len(catalog)),
        cost=COST,
        seed=task.seed,
    )
    loader = StepLoader(
        dataset=RowDataset(catalog, encoder),
        steps=steps(catalog, plan),
        rank=0,
        world_size=1,
        micro_batches=rows_per_step,
        num_workers=task.workers,
        prefetch=task.prefetch,
        row_bytes=row_bytes(task.max_length, encoder.tokens_per_tile, encoder.tile_size),
    )
    for _, rows in loader:
        for row in rows:
            if row.errors:
                raise row.errors[0][1]
        yield sum(len(row.keys) for row in rows)
