"""The data that flows through eagle_train, from a shard member to a training step.

Shape letters: N tiles, S tile side (pixels), T tokens of a row, K samples in a row, M visual tokens.

A tile is flat, (3, S, S), or, of native-resolution models, a block of D frames, (3, D, S, S): one visual token each.
Pictures of such models have as many tiles as they need; `grids` tell how these lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # tools that only read records, as `trace` does, need not wait seconds for torch
    import torch

IGNORE_INDEX = -100
"""Label of a position without loss; the default of `torch.nn.functional.cross_entropy`."""

Role = Literal["system", "user", "assistant"]
MediaKind = Literal["image", "video", "document"]


class SampleError(ValueError):
    """A sample that cannot be used. It is counted by source and reason, never repaired silently.

    Args:
        key: key of the sample.
        reason: short fixed word to count by, for example `unreadable_image` (see `REASONS`).
        detail: what exactly is wrong, with the numbers.
    """

    def __init__(self, key: str, reason: str, detail: str) -> None:
        assert reason in REASONS, f"unknown reason {reason!r}"
        super().__init__(f"{key}: {reason}: {detail}")
        self.key = key
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.key, self.reason, self.detail)


REASONS = (
    "bad_record",  # the annotation cannot be parsed
    "missing_shard",  # every sample of a shard that is not there
    "missing_media",  # a member or file that the annotation names is not there
    "unreadable_image",
    "unreadable_video",
    "placeholder_mismatch",  # number of placeholders and of media disagree
    "no_answer",  # no assistant turn, or only empty ones
    "too_long",  # longer than a row
    "length_mismatch",  # encoded length differs from the planned one
    "quarantined",  # its key is on the run's quarantine list
    "empty_clip",  # a video's start and end have none of its frames between them
    "changed_media",  # a file that is no member of the shard is another one than when the index was made
)
"""Why a sample is left out. The ledger's files hold places in this tuple: append, never change the order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Media:
    """Header facts of one image, video or document; the encoded bytes stay in their shard.

    A document is a list of page images. A video is one file, part of one (a clip), or a list of frame images.
    """

    kind: MediaKind
    member: str = ""
    """Extension of the tar member that holds the bytes, for example `0.png`; empty where `members` hold them."""
    members: tuple[str, ...] = ()
    """Of a list of frames or pages: one tar member each, in order."""
    width: int = 0
    """Pixels: of an image as stored, of a video as shown (after its rotation metadata), of a list those of its largest
    image as stored; 0 where not probed yet."""
    height: int = 0
    orientation: int = 1
    """EXIF orientation of an image, 1 to 8; from 5 on, width and height change places when it is turned upright."""
    start: float = 0.0
    """Seconds from the first frame of the file to the clip; 0 with an `end` of 0 for a whole file."""
    end: float = 0.0
    duration: float = 0.0
    """Seconds of the clip; 0 for an image or a document."""
    num_frames: int = 1
    """Frames of the clip (container's count or estimate), or pages of the document; 1 for an image."""
    min_pixels: int = 0
    """Fewest and most pixels of the picture as a model of native resolution sees it, where the record says so; 0 where
    it does not. Models of tiles have no use for them."""
    max_pixels: int = 0
    total_pixels: int = 0
    """Most pixels of all frames of a video together, for such a model; 0 where the record does not say."""
    resized_width: int = 0
    """Pixels of that picture itself, given by the record; 0 where it is not."""
    resized_height: int = 0
    fps: float = 0.0
    """Frames a second that the record asks for of a video; 0 where it does not."""
    nframes: int = 0
    """Frames that the record asks for of a video, instead of a rate; 0 where it does not."""
    min_frames: int = 0
    """Fewest and most frames of a video, where the record says so; 0 where it does not."""
    max_frames: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "members", tuple(self.members))  # a table gives a list


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One turn: text and media in the order they are read."""

    role: Role
    content: tuple[str | int, ...]
    """`str` is text, `int` an index into `Sample.media`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One training example as its source provides it: nothing decoded, nothing tokenized."""

    key: str
    """`<source>/<shard stem>/<tar key>`: unique, named in every error about this sample."""
    source: str
    messages: tuple[Message, ...]
    media: tuple[Media, ...] = ()
    meta: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the record holds, for example `{"type": "ink_colour"}`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaPlan:
    """How one image, video or document enters the sequence; decided from its header alone."""

    num_frames: int = 1
    """Frames of a video or pages of a document that enter; 1 for an image."""
    rows: int = 1
    cols: int = 1
    thumbnail: bool = False
    frames_per_tile: int = 1
    """Consecutive frames that share tiles; the last ones may be fewer."""

    @property
    def num_steps(self) -> int:
        """Grids of tiles, one after the other in time."""
        return -(-self.num_frames // self.frames_per_tile)

    @property
    def num_tiles(self) -> int:
        """Tiles of all frames together."""
        return self.num_steps * (self.rows * self.cols + int(self.thumbnail))

    @property
    def num_tile_pairs(self) -> int:
        """Pairs of tiles that see each other where an encoder attends over a whole grid, summed over all grids."""
        return self.num_steps * (self.rows * self.cols) ** 2


def tile_shape(size: int, depth: int) -> tuple[int, ...]:
    """Returns the shape of a tile of `size` pixels a side: (3, S, S), or (3, D, S, S) for a depth D above 0."""
    return (3, depth, size, size) if depth else (3, size, size)


Grid = tuple[int, int, int]
"""(steps, rows, cols) of the tiles of one native-resolution image or video, in that order in `pixels`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A sample ready to pack. `labels` is already shifted: `labels[t]` follows `input_ids[t]`."""

    key: str
    source: str
    input_ids: torch.Tensor
    """(T,) int64; image positions hold a filler id whose embedding is replaced."""
    labels: torch.Tensor
    """(T,) int64; IGNORE_INDEX where there is no loss."""
    loss_weights: torch.Tensor
    """(T,) float32; 0 where there is no loss."""
    image_positions: torch.Tensor
    """(M,) int64, increasing: where the visual tokens go, tile after tile."""
    pixels: torch.Tensor
    """(N, 3, S, S) or (N, 3, D, S, S) uint8, in the order of their positions; N may be 0."""
    grids: tuple[Grid, ...] = ()
    """Of native-resolution pictures, in order: N is the sum of their products. Flat tiles have none."""


@dataclass(frozen=True, kw_only=True)  # no slots: with them it takes three times as long to pickle
class SampleUse:
    """One planned sample of a row and what became of it; the ledger's unit. A bad one has zero of everything."""

    shard: int
    """Number of its shard in the stage's catalog."""
    index: int
    """Row of the sample in its shard's index."""
    num_tokens: int
    """Tokens in the row, visual ones included."""
    num_targets: int
    """Tokens with loss."""
    num_tiles: int
    """Tiles of its images and frames."""
    num_frames: int
    """Frames of its videos and pages of its documents."""
    error: SampleError | None = None
    """Why it was not used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPart:
    """Which part of a row a rank has, where the R ranks of a group share rows (sequence parallelism).

    A row's tokens are cut into R runs, and so are its tiles, whose visual tokens may stand in any rank's run.
    """

    index: int
    """The rank's place in its group, from 0."""
    begin: int
    """Tokens of the row before its run."""
    made: tuple[int, ...]
    """(R + 1,): visual tokens that the ranks before r make of their tiles."""
    placed: tuple[int, ...]
    """(R + 1,): visual tokens that stand in the runs of the ranks before r; ends with the same number as `made`."""

    @property
    def size(self) -> int:
        """R, ranks that share the row."""
        return len(self.made) - 1

    @property
    def num_made(self) -> int:
        """Visual tokens that this rank makes."""
        return self.made[self.index + 1] - self.made[self.index]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedBatch:
    """One micro-batch of one rank: K samples laid end to end in one row of T tokens, no padding.

    Where ranks share rows, it holds what `part` says: T, M and N count what the rank has. The K samples and their
    lengths stay those of the whole row; some may have no token here.
    """

    input_ids: torch.Tensor
    """(T,) int64."""
    labels: torch.Tensor
    """(T,) int64, already shifted; IGNORE_INDEX where there is no loss."""
    loss_weights: torch.Tensor
    """(T,) float32; holds the averaging policy (token, sample, square root), so neither the model
    nor the trainer knows which one is used."""
    position_ids: torch.Tensor
    """(T,) int64; restarts at 0 in every sample. Or (4, T) for an LLM with multimodal rotary positions: that, then
    the steps in time, rows and columns, which text has all alike."""
    cu_seqlens: torch.Tensor
    """(K + 1,) int32, cumulative sample lengths: [0, ..., T]."""
    max_seqlen: int
    """Longest of the K samples, in tokens."""
    segment_lengths: tuple[int, ...]
    """The K lengths in tokens, on the host wherever the tensors are."""
    image_positions: torch.Tensor
    """(M,) int64, increasing: where the visual tokens go."""
    pixels: torch.Tensor
    """(N, 3, S, S) or (N, 3, D, S, S) uint8, N >= 1: a row without images carries one placeholder tile, so that
    every rank runs the encoders (ZeRO-3 would wait, or apply stale gradients, otherwise)."""
    num_images: int
    """Real tiles: N, or 0 where the only tile is the placeholder."""
    num_tokens: int
    """Tokens of samples; 0 for the empty row of a rank that has nothing to do in this step."""
    num_targets: int
    """Positions with a label: counted on the host, so that nobody waits for a GPU to count them."""
    keys: tuple[str, ...]
    """The K sample keys."""
    sources: tuple[str, ...]
    """The K source names."""
    grids: tuple[Grid, ...] = ()
    """Of native-resolution pictures, the placeholder's too; no tensor, as attention is cut by them on the host."""
    errors: tuple[tuple[str, SampleError], ...] = ()
    """(source, error) of planned samples of this row that turned out to be bad when they were decoded."""
    row: int = -1
    """Number of the row in its stage; -1 for the empty row."""
    uses: tuple[SampleUse, ...] = ()
    """Every planned sample of the row in order, used and bad."""
    part: RowPart | None = None
    """Which part of the row this is; None: all of it."""

    def to(self, device: torch.device) -> PackedBatch:
        """Returns the batch with its tensors on `device` (asynchronously from pinned memory)."""
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in self._tensors()})

    def pin_memory(self) -> PackedBatch:
        """Returns the batch with its tensors in page-locked memory; called by the DataLoader."""
        return replace(self, **{k: v.pin_memory() for k, v in self._tensors()})

    def _tensors(self):
        import torch

        values = ((name, getattr(self, name)) for name in self.__slots__)
        return [(name, value) for name, value in values if isinstance(value, torch.Tensor)]
