"""What every sample takes up in a row: decided from index and text lengths alone, kept in a file beside the shard.

One Arrow file per shard and layout, named by the fingerprint of everything that token counts depend on: a row per
sample with its tokens, tiles and frames, and which tiles and frames were chosen for each medium. So the plan reads
arrays, and encoding does what was planned.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from eagle_train.data.answers import AnswerEnd
from eagle_train.data.encode import Encoder
from eagle_train.data.index import ensure_index, index_path, index_stem, is_current, sample_key
from eagle_train.data.lengths import TextLayout, ensure_lengths, has_lengths, lengths_path, read_lengths
from eagle_train.data.locations import Location
from eagle_train.data.media import MediaError
from eagle_train.data.storage import Storage
from eagle_train.data.tables import DamagedTable, read_made, read_metadata, write_table
from eagle_train.data.too_long import TooLong
from eagle_train.types import Media, MediaPlan, SampleError

LAYOUT_VERSION = "5"
"""Part of a layout's fingerprint: to be raised where the same header facts give other frames, tiles or tokens."""
COUNTS = ("num_tokens", "num_targets", "num_tiles", "num_frames", "num_answers", "lost_turns", "lost_tokens")
PAIRS = "num_tile_pairs"
PLANS = pa.struct(
    [
        ("num_frames", pa.int32()),
        ("rows", pa.int16()),
        ("cols", pa.int16()),
        ("thumbnail", pa.bool_()),
        ("frames_per_tile", pa.int16()),
    ]
)
SCHEMA = pa.schema(
    [
        *[(name, pa.int32()) for name in COUNTS],
        (PAIRS, pa.int64()),
        ("media", pa.list_(PLANS)),
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Everything that decides how many tokens a sample takes.

    Args:
        encoder: template, tokenizer, tiling, and the policy for frames and tiles.
        max_length: tokens of a row.
        too_long: what becomes of longer samples.
        text: tokenizer and template, and their fingerprint.
        fingerprint: names all of it.
    """

    encoder: Encoder
    max_length: int
    too_long: TooLong
    text: TextLayout
    fingerprint: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleLayout:
    """How one sample is laid out; all counts are of what stays of it."""

    num_tokens: int
    num_targets: int
    """Supervised tokens."""
    media: tuple[MediaPlan, ...]
    num_answers: int
    num_frames: int = 0
    """Frames of all videos and pages of all documents."""
    lost_turns: int = 0
    """Turns (questions and answers) that do not fit the row."""
    lost_tokens: int = 0
    """Tokens of these, and of their media where all had the fewest frames and tiles."""

    @property
    def num_tiles(self) -> int:
        """Tiles of all media."""
        return sum(plan.num_tiles for plan in self.media)

    @property
    def num_tile_pairs(self) -> int:
        """Pairs of tiles of one grid, of all media; see `MediaPlan`."""
        return sum(plan.num_tile_pairs for plan in self.media)


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The sums of a shard: what a catalog must know without opening the columns."""

    num_samples: int
    num_usable: int = 0
    num_tokens: int = 0
    num_targets: int = 0
    num_tiles: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    """Samples by the reason they cannot be used for."""
    shortened: tuple[int, int, int] = (0, 0, 0)
    """Samples that lost turns, and the turns and tokens they lost."""
    digest: str = ""
    """Hash of the index and of the counts."""


def lay_out(key: str, ends: Sequence[AnswerEnd], media: Sequence[Media], layout: Layout) -> SampleLayout:
    """Returns the layout of a sample.

    Text is paid first, whole; media get what is left of the row. A sample that is too long even with the fewest frames
    and tiles is shortened to whole turns if `layout.too_long` allows it; their media then share what is left.

    Args:
        key: named in errors.
        ends: its text up to each of its answers.
        media: header facts, in reading order.

    Raises:
        SampleError: `too_long` or `no_answer`, if nothing of it can be trained on.
    """
    room, stay, lost = layout.max_length, len(ends), 0

    def plan(end: AnswerEnd, budget: int) -> tuple[tuple[MediaPlan, ...], int]:
        return layout.encoder.plan_media(media[: end.num_media], budget)

    plans, tokens = plan(ends[-1], room - ends[-1].num_tokens)
    if ends[-1].num_tokens + tokens > room:
        smallest = [end.num_tokens + plan(end, 0)[1] for end in ends]
        stay = layout.too_long.num_answers(smallest, room)
        if stay == 0:
            detail = f"{smallest[-1]} tokens with the fewest frames and tiles, {smallest[0]} up to the first answer"
            raise SampleError(key, "too_long", f"{detail}, a row has {room}; raise max_length, or see data.too_long")
        plans, tokens = plan(ends[stay - 1], room - ends[stay - 1].num_tokens)
        lost = smallest[-1] - smallest[stay - 1]
    end = ends[stay - 1]
    if end.num_targets == 0:
        raise SampleError(key, "no_answer", "no token of an answer is supervised under this template")
    return SampleLayout(
        num_tokens=end.num_tokens + tokens,
        num_targets=end.num_targets,
        media=plans,
        num_frames=sum(p.num_frames for p, m in zip(plans, media, strict=False) if m.kind != "image"),
        num_answers=stay,
        lost_turns=2 * (len(ends) - stay),  # each an answer with its question
        lost_tokens=lost,
    )


def layout_table(rows: Sequence[SampleLayout | SampleError], digest: str) -> tuple[pa.Table, Summary]:
    """Returns the table of a shard's samples, see `SCHEMA`, and its sums.

    Args:
        rows: the layout of each sample, or what is wrong with it.
        digest: of the shard's index.
    """
    good = [row for row in rows if isinstance(row, SampleLayout)]
    counts = {name: np.zeros(len(rows), np.int32) for name in COUNTS} | {PAIRS: np.zeros(len(rows), np.int64)}
    for place, row in enumerate(rows):
        if isinstance(row, SampleLayout):
            for name, column in counts.items():
                column[place] = getattr(row, name)
    columns = [pa.array(column) for column in counts.values()]
    media = [[asdict(plan) for plan in row.media] if isinstance(row, SampleLayout) else [] for row in rows]
    errors = [row if isinstance(row, SampleError) else None for row in rows]
    columns += [
        pa.array(media, pa.list_(PLANS)),
        pa.array([error and error.reason for error in errors], pa.string()),
        pa.array([error and error.detail for error in errors], pa.string()),
    ]
    cut = counts["lost_turns"] > 0
    content = hashlib.sha256(digest.encode() + counts["num_tokens"].tobytes() + counts["num_tiles"].tobytes())
    summary = Summary(
        num_samples=len(rows),
        num_usable=len(good),
        num_tokens=int(counts["num_tokens"].sum(dtype=np.int64)),
        num_targets=int(counts["num_targets"].sum(dtype=np.int64)),
        num_tiles=int(counts["num_tiles"].sum(dtype=np.int64)),
        dropped=dict(sorted(Counter(error.reason for error in errors if error).items())),
        shortened=(int(cut.sum()), int(counts["lost_turns"].sum()), int(counts["lost_tokens"].sum(dtype=np.int64))),
        digest=content.hexdigest()[:16],
    )
    return pa.Table.from_arrays(columns, schema=SCHEMA), summary


def to_metadata(summary: Summary) -> dict[bytes, bytes]:
    """Returns the sums as metadata of a file."""
    return {b"summary": json.dumps(asdict(summary)).encode()}


def from_metadata(metadata: dict[bytes, bytes]) -> Summary:
    """Returns what `to_metadata` wrote."""
    values = json.loads(metadata[b"summary"])
    return Summary(**values | {"shortened": tuple(values["shortened"])})


def layout_path(stem: Path, fingerprint: str) -> Path:
    """Returns where the layout of a shard is, from the common stem of its index files."""
    return stem.with_name(f"{stem.name}.layout-{fingerprint}.arrow")


def ensure_layout(
    shard: Location,
    index_dir: Path | None,
    source: str,
    layout: Layout,
    media_root: Path | None = None,
    storage: Storage | None = None,
) -> Path:
    """Builds the layout of a shard, and what it needs, unless it has one; returns its path.

    Args:
        source: name of the shard's source, for errors.
        media_root, storage: see `ensure_index`.
    """
    path = layout_path(index_stem(shard, index_dir), layout.fingerprint)
    if has_layout(shard, index_dir, layout.fingerprint, media_root, storage):
        return path
    ends = read_lengths(read_made(partial(ensure_lengths, shard, index_dir, layout.text, media_root, storage)))
    index = read_made(partial(ensure_index, shard, index_dir, media_root=media_root, storage=storage))
    columns = [index[name].to_pylist() for name in ("key", "media", "reason", "detail")]
    rows = []
    for end, key, media, reason, detail in zip(ends, *columns, strict=True):
        key = sample_key(source, shard, key)
        try:
            if reason is not None:
                raise SampleError(key, reason, detail)
            rows.append(lay_out(key, end, [Media(**medium) for medium in media], layout))
        except SampleError as error:
            rows.append(error)
        except MediaError as error:  # larger than the run's policy allows
            rows.append(SampleError(key, error.reason, error.detail))
    digest = index.schema.metadata[b"digest"]
    table, summary = layout_table(rows, digest.decode())
    made_from = {b"index": digest, b"text": layout.text.fingerprint.encode()}
    write_table(table.replace_schema_metadata(made_from | to_metadata(summary)), path)
    return path


def has_layout(
    shard: Location,
    index_dir: Path | None,
    fingerprint: str,
    media_root: Path | None = None,
    storage: Storage | None = None,
) -> bool:
    """Returns whether a shard has a layout that fits it as it is now, and the texts that it was made from."""
    path = layout_path(index_stem(shard, index_dir), fingerprint)
    try:
        text = read_metadata(path)[b"text"].decode()
    except (FileNotFoundError, NotADirectoryError, DamagedTable):
        return False
    if not has_lengths(shard, index_dir, text, media_root, storage):
        return False
    return is_current(path, lambda: {b"index": read_metadata(index_path(shard, index_dir))[b"digest"]})


def texts_path(shard: Location, index_dir: Path | None, fingerprint: str) -> Path:
    """Returns where the texts of a shard are that its layout was made from, see `lengths`."""
    made_from = read_metadata(layout_path(index_stem(shard, index_dir), fingerprint))
    return lengths_path(shard, index_dir, made_from[b"text"].decode())
