"""The mp4 bytes of a few frames."""

from __future__ import annotations

import io
from collections.abc import Sequence

import av
from PIL import Image


def mp4_bytes(frames: Sequence[Image.Image], *, frames_per_second: int) -> bytes:
    """Returns the RGB frames as an H.264 mp4 file; equal frames give equal bytes.

    Raises:
        ValueError: without frames, or if they differ in size or have an odd side (4:2:0 halves the colours).
    """
    sizes = {frame.size for frame in frames}
    if len(sizes) != 1 or any(side % 2 for size in sizes for side in size):
        raise ValueError(f"an mp4 needs frames of one even size, not {sorted(sizes)}; draw them so")
    (size,) = sizes
    buffer = io.BytesIO()
    with av.open(buffer, mode="w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=frames_per_second)
        stream.width, stream.height = size
        stream.pix_fmt = "yuv420p"
        # The bits that x264 writes depend on how many threads share a frame. Its assembler was seen to give other bits
        # now and then for equal frames, so it is off, as is all looking ahead.
        options = {"threads": "1", "preset": "veryfast", "tune": "zerolatency", "crf": "18"}
        stream.options = options | {"x264-params": "asm=0"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))
    return buffer.getvalue()
