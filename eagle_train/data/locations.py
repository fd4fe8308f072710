"""Where a shard is: a local path or a URL, with the few operations that both need.

A location is a `Path` if it is local and a `str` if it is a URL (`s3://bucket/a.tar`). `pathlib` would ruin a URL
(`Path("s3://b")` is `s3:/b`), so code that may meet one uses these functions instead of its attributes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

Location = str | Path
"""What callers may give; `as_location` makes it one of the two kinds."""

PROTOCOLS = frozenset({"s3", "gs", "http", "https", "memory"})
"""What is read through `fsspec`. Nothing that starts a program, opens a shell or wraps another location."""

HEAD = re.compile(r"([A-Za-z][\w+.-]*(?:::[\w+.-]+)*):")
BRACES = re.compile(r"\{(\d+)\.\.(\d+)\}")


def as_location(location: Location) -> Location:
    """Returns a local location (also `file:///folder/a.tar`) as a `Path` and any other as its URL.

    Raises:
        ValueError: for a protocol that is not read, among them `pipe:`, and for a URL that went through `Path`.
    """
    text = str(location)
    head = HEAD.match(text)
    if head is None:
        return Path(location)
    protocol, rest = head[1].lower(), text[head.end() :]
    if protocol == "file" and rest.startswith("///"):
        return Path(rest[2:])
    if protocol in PROTOCOLS and rest.startswith("//") and rest[2:]:
        return f"{protocol}:{rest}"
    known = ", ".join(f"{name}://" for name in sorted(PROTOCOLS))
    remedy = f"use one of {known}, file:///..., or a path (a relative one with a colon: in its absolute form)"
    raise ValueError(f"location {shown(text)!r}: protocol {head[1]!r} is not read this way; {remedy}")


def protocol_of(url: str) -> str:
    """Returns the protocol of a URL, for example `s3`."""
    return url.partition("://")[0]


def shown(location: Location) -> str:
    """Returns a location as it may be printed: without the user name or signature that a URL can hold."""
    text = re.sub(r"^(\w+://)[^/@]*@", r"\1", str(location))
    return text.partition("?")[0] if text.startswith(("http://", "https://")) else text


def redacted(text: str, location: Location) -> str:
    """Returns a library's message about a location without what `shown` leaves out."""
    text = text.replace(str(location), shown(location))
    return re.sub(r"\?[^\s'\")]+", "?...", text) if "?" in str(location) else text


def file_name(location: Location) -> str:
    """Returns the last part of a location, without the query of a URL."""
    return location.name if isinstance(location, Path) else shown(location).rstrip("/").rpartition("/")[2]


def stem(location: Location) -> str:
    """Returns the last part of a location without its last suffix: `train-0001` of `s3://bucket/train-0001.tar`."""
    return location.stem if isinstance(location, Path) else Path(file_name(location)).stem


def parent(location: Location) -> Location:
    """Returns the folder of a location; for a URL without what follows `?`."""
    if isinstance(location, Path):
        return location.parent
    return location.partition("?")[0].rstrip("/").rpartition("/")[0]


def join(folder: Location, name: str) -> Location:
    """Returns the location of `name` in `folder`; a `name` that is a URL or an absolute path stays what it is."""
    name_alone = as_location(name)
    if isinstance(name_alone, str) or name_alone.is_absolute():
        return name_alone
    folder = as_location(folder)
    return folder / name if isinstance(folder, Path) else f"{folder.rstrip('/')}/{name}"


def name_folders(folders: Sequence[Path]) -> dict[Path, str]:
    """Returns a name for each of some folders: its last part, after as many as it takes to tell it from the others."""
    names: dict[Path, str] = {}
    depth = 0
    while len(names) < len(folders):
        depth += 1
        ends = {folder: folder.absolute().parts[-depth:] for folder in folders}
        counts = Counter(ends.values())
        for folder, end in ends.items():
            if counts[end] == 1:
                names.setdefault(folder, str(Path(*end)))
    return names


def expand_braces(pattern: str) -> list[str]:
    """Returns what `{000..012}` stands for, numbers padded alike; servers without listings need it.

    Raises:
        ValueError: if the last number is before the first.
    """
    braces = BRACES.search(pattern)
    if braces is None:
        return [pattern]
    first, last = int(braces[1]), int(braces[2])
    if last < first:
        raise ValueError(f"{shown(pattern)}: {braces[0]} counts from {first} to {last}; write the smaller number first")
    start, end = pattern[: braces.start()], pattern[braces.end() :]
    numbers = (f"{number:0{len(braces[1])}d}" for number in range(first, last + 1))
    return [start + number + tail for number in numbers for tail in expand_braces(end)]
