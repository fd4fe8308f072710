"""The samples of WebDataset tars as pieces of equal size: where each is, from the headers alone."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path

from eagle_train.data.convert import from_members
from eagle_train.data.shard_reader import Member
from eagle_train.data.shards import TarSample, scan_shard
from eagle_train.data.split import Part, PieceWriter, read_piece
from eagle_train.data.storage import open_shard
from eagle_train.data.work_pool import run_all
from eagle_train.types import SampleError


@dataclass(frozen=True, slots=True)
class TarRecords:
    """Samples of tars.

    Args:
        path: file of `split_tars`.
        media_root: see `convert.from_members`.
    """

    path: Path
    media_root: Path | None = None

    def read(self) -> Iterator[TarSample | SampleError]:
        """Yields the samples, see `pieces.Records`."""
        reader = None
        for key, line in read_piece(self.path):
            place = json.loads(line)
            tar = Path(place["tar"])
            if reader is None or reader.location != tar:
                if reader is not None:
                    reader.close()
                reader = open_shard(tar).read_ahead()
            members = [Member(*member) for member in place["members"]]
            yield from_members(key, f"{tar.stem}/{place['key']}", reader, members, self.media_root)
        if reader is not None:
            reader.close()


@dataclass(frozen=True, slots=True)
class Contents:
    """The list of what is in a tar.

    Args:
        path: file of the list.
    """

    tar: Path
    path: Path

    def __str__(self) -> str:
        return str(self.tar)


def split_tars(
    tars: Sequence[Path],
    lists: Path,
    folder: Path,
    *,
    name: str,
    records_per_piece: int,
    workers: int,
    progress: Callable[[int], None],
) -> dict[str, Part]:
    """Writes where the samples of tars are as files `<folder>/<name>/<piece>.jsonl`; returns their number.

    A line is the number of the sample in all tars, from 0, and its place: `00000012 {"tar": ..., "key": ...}`.

    Args:
        tars: in this order.
        lists: folder of what is in each tar; those that are there are kept.
        workers: processes that read headers.
        progress: called with the number of tars just read.

    Raises:
        ValueError: for a tar that is not whole.
    """
    lists.mkdir(exist_ok=True)
    contents = [Contents(tar, lists / f"{number:06d}.jsonl") for number, tar in enumerate(tars)]
    missing = [each for each in contents if not each.path.is_file()]
    progress(len(contents) - len(missing))
    for _ in run_all(write_list, missing, workers, len(missing)):
        progress(1)
    writer = PieceWriter(folder / name, records_per_piece)
    with closing(writer):
        for number, line in enumerate(_lines(each.path for each in contents)):
            writer.write(f"{number:08d}", line)
    return {name: writer.part()}


def _lines(files: Iterable[Path]) -> Iterator[bytes]:
    """Yields the lines of all files, without their ends."""
    for path in files:
        with path.open("rb") as file:
            yield from (line.rstrip(b"\n") for line in file)


def write_list(contents: Contents) -> None:
    """Writes the place of each sample of a tar as a line of a file that appears when it is whole."""
    aside = contents.path.with_name(f"{contents.path.name}.{uuid.uuid4().hex[:12]}.partial")
    with aside.open("w") as file:
        for key, members in scan_shard(contents.tar):
            place = {"tar": str(contents.tar), "key": key, "members": [astuple(member) for member in members]}
            file.write(f"{json.dumps(place)}\n")
    aside.replace(contents.path)
