"""Size and orientation of plain JPEG and PNG files from their first bytes, without Pillow.

Building an index asks for the size of every image, and Pillow takes ten times as long to give it. What is read
here is only what leaves no doubt; of everything else, damaged files included, Pillow is the judge. So an answer
is Pillow's answer (a test mutates bytes to see that it is).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from struct import Struct
from struct import error as StructError

from eagle_train.data.media import MAX_PIXELS

Header = tuple[int, int, int]
"""Width and height as stored (pixels), EXIF orientation 1 to 8."""

JPEG_START = b"\xff\xd8\xff"
PNG_START = b"\x89PNG\r\n\x1a\n"

JPEG_FRAMES = frozenset({0xC0, 0xC1, 0xC2})  # baseline, extended, progressive (ISO 10918-1, table B.1)
JPEG_TABLES = frozenset({0xC4, 0xDD, 0xFE})  # Huffman tables, restart interval, comment
JPEG_SCAN, JPEG_QUANTIZATION, JPEG_EXIF = 0xDA, 0xDB, 0xE1
JPEG_LEAST = {  # bytes that Pillow reads of an application segment that starts so, by marker
    0xE0: (b"JFIF", 12),
    0xE2: (b"ICC_PROFILE\0", 14),
    0xEE: (b"Adobe", 12),
}

PNG_DEPTHS = {0: {1, 2, 4, 8, 16}, 2: {8, 16}, 3: {1, 2, 4, 8}, 4: {8, 16}, 6: {8, 16}}  # by colour type
PNG_SIZES = {b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9, b"tIME": 7}  # chunks of a fixed length, bytes
PNG_TRANSPARENT = {0: 2, 2: 6}  # least bytes of a transparent grey level or colour, by colour type
PNG_PROFILE_BYTES = 1 << 20  # Pillow refuses larger colour profiles
PNG_ANY = frozenset({b"PLTE", b"bKGD", b"sBIT", b"hIST"})  # chunks of any content
PNG_TEXTS = (b"Software\0", b"Comment\0", b"Title\0", b"Author\0", b"Description\0", b"date:")
"""Keys of texts that Pillow only keeps; others could hold an EXIF block, or pass for one of its own attributes."""

ORIENTATION, X_RESOLUTION, RESOLUTION_UNIT = 0x0112, 0x011A, 0x0128
SHORT, RATIONAL = 3, 5
EXIF_UNITS = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Bytes of a value, by its TIFF 6.0 type."""
EXIF_KINDS = {ORIENTATION: SHORT, X_RESOLUTION: RATIONAL, RESOLUTION_UNIT: SHORT}
"""The tags that Pillow reads when it opens a JPEG; each has one value of this type."""

FRAME, CHUNK, IHDR, CRC = Struct(">BHHB"), Struct(">I4s"), Struct(">IIBBBBB"), Struct(">I")
EXIF_BYTE_ORDERS = {
    b"II*\0": (Struct("<I"), Struct("<H"), Struct("<HHII")),
    b"MM\0*": (Struct(">I"), Struct(">H"), Struct(">HHII")),
}


def read_header(head: bytes) -> Header | None:
    """Returns the (width, height, orientation) of an image, or None where more than these bytes must be asked.

    Args:
        head: the file, or its beginning. 64 KiB are enough for nearly every JPEG; of a PNG only a whole file is,
            since an orientation may be behind its pixels.

    Returns None also for other formats and for whatever is unusual or wrong: see `images.probe_image`.
    """
    try:
        if head.startswith(JPEG_START):
            header = _read_jpeg(head)
        elif head.startswith(PNG_START):
            header = _read_png(head)
        else:
            return None
    except (StructError, IndexError):  # the bytes end within a field
        return None
    if header is None or not 0 < header[0] * header[1] <= MAX_PIXELS:
        return None
    return header


def _read_jpeg(head: bytes) -> Header | None:
    """Returns what the segments up to the first scan say."""
    position, size, exif, xmp = 2, None, None, False
    while head[position] == 0xFF:
        marker = head[position + 1]
        start = position + 4
        position = end = position + 2 + (head[position + 2] << 8 | head[position + 3])
        if end < start or end > len(head):
            return None
        if marker == JPEG_SCAN:
            break
        if marker in JPEG_TABLES:
            continue
        content = head[start:end]
        if marker in JPEG_FRAMES:
            depth, height, width, layers = FRAME.unpack_from(content)
            if size or depth != 8 or layers not in (1, 3, 4) or len(content) != 6 + 3 * layers:
                return None
            size = (width, height)
        elif marker == JPEG_QUANTIZATION:
            if not _are_tables(content):
                return None
        elif marker == JPEG_EXIF and content.startswith(b"Exif\0\0"):
            if exif is not None:
                return None
            exif = content[6:]
        elif 0xE0 <= marker <= 0xEF:
            if not _is_plain(marker, content):
                return None
            xmp = xmp or (marker == JPEG_EXIF and b"tiff:Orientation" in content)
        else:
            return None
    else:
        return None
    orientation = 0 if exif is None else _read_exif(exif)
    if size is None or orientation is None or (xmp and not orientation):
        return None
    return *size, orientation or 1


def _are_tables(content: bytes) -> bool:
    """Returns whether a segment holds whole quantization tables of 8 or 16 bits."""
    position = 0
    while position < len(content):
        position += 65 if content[position] < 16 else 129
    return position == len(content)


def _is_plain(marker: int, content: bytes) -> bool:
    """Returns whether an application segment is one that Pillow reads without trouble."""
    start, least = JPEG_LEAST.get(marker, (b"", 0))
    if content.startswith(start) and len(content) < least:
        return False
    if marker == 0xED:  # Photoshop: refused by Pillow where a resource ends behind its number
        return content[-6:-2] != b"8BIM"
    return not (marker == 0xE2 and content.startswith(b"MPF\0"))  # several pictures in one file


def _read_exif(block: bytes) -> int | None:
    """Returns the orientation in a TIFF block, 0 where it has none; None if anything is unusual."""
    order = EXIF_BYTE_ORDERS.get(block[:4])
    if order is None:
        return None
    long, short, entry = order
    (first,) = long.unpack_from(block, 4)
    (count,) = short.unpack_from(block, first)
    start = first + 2
    if first < 8 or start + 12 * count > len(block):
        return None
    orientation = total = 0
    for position in range(start, start + 12 * count, 12):
        tag, kind, num, value = entry.unpack_from(block, position)
        unit = EXIF_UNITS.get(kind)
        if unit is None or not num:
            return None
        if (size := num * unit) > 4:
            total += size
            if value + size > len(block) or total > len(block):
                return None
        if tag in EXIF_KINDS:
            if num != 1 or kind != EXIF_KINDS[tag]:
                return None
            if tag == ORIENTATION:
                if orientation:
                    return None
                (found,) = short.unpack_from(block, position + 8)
                orientation = found if 1 <= found <= 8 else 1
    return orientation


def _read_png(head: bytes) -> Header | None:
    """Returns what the chunks say, all of them up to IEND."""
    length, kind = CHUNK.unpack_from(head, 8)
    if (length, kind) != (13, b"IHDR") or not _is_sound(head, 16, 13):
        return None
    width, height, depth, colour, compression, filtering, interlace = IHDR.unpack_from(head, 16)
    if depth not in PNG_DEPTHS.get(colour, ()) or compression or filtering or interlace > 1:
        return None
    exif, pixels = None, False
    for kind, start, length in png_chunks(head, 33):
        if kind == b"IDAT":
            pixels = True
        elif kind == b"IEND":
            return (width, height, exif or 1) if pixels else None
        elif not pixels and not _is_sound(head, start, length):
            return None
        elif kind == b"eXIf":  # Pillow reads one behind the pixels only if it can decode them
            if pixels or exif is not None or (exif := _read_exif(head[start : start + length])) is None:
                return None
        elif not _is_plain_chunk(kind, head[start : start + length], colour):
            return None
    return None


def png_chunks(data: bytes, position: int = 8) -> Iterator[tuple[bytes, int, int]]:
    """Yields (kind, start of the content, length of the content) of a PNG's chunks, as far as they are there.

    Args:
        position: of the first chunk, bytes.
    """
    while position + 8 <= len(data):
        length, kind = CHUNK.unpack_from(data, position)
        yield kind, position + 8, length
        position += length + 12


def _is_plain_chunk(kind: bytes, content: bytes, colour: int) -> bool:
    """Returns whether a chunk is one that says nothing about size and orientation and that Pillow accepts."""
    if kind == b"tRNS":
        return len(content) >= PNG_TRANSPARENT.get(colour, 0)
    if kind == b"tEXt":
        return content.startswith(PNG_TEXTS)
    if kind == b"iCCP":
        return _is_profile(content)
    return kind in PNG_ANY or PNG_SIZES.get(kind) == len(content)


def _is_profile(content: bytes) -> bool:
    """Returns whether a compressed colour profile can be read, and is no bomb."""
    name, _, packed = content.partition(b"\0")
    if not name or packed[:1] != b"\0":  # method 0, deflate, is the only one
        return False
    unpacking = zlib.decompressobj()
    try:
        unpacking.decompress(packed[1:], PNG_PROFILE_BYTES)
    except zlib.error:
        return False
    return not unpacking.unconsumed_tail


def _is_sound(head: bytes, start: int, length: int) -> bool:
    """Returns whether a chunk's content is there and has the checksum that is written behind it."""
    (wanted,) = CRC.unpack_from(head, start + length)
    return zlib.crc32(head[start - 4 : start + length]) == wanted
