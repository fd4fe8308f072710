"""Which frames are chosen and when they are shown: properties over all sizes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_train.data.frames import (
    EvenFrameRate,
    FrameRate,
    clip_bounds,
    clip_frames,
    frame_indices,
    label_seconds,
    shown_seconds,
)
from eagle_train.types import Media

TOTALS = st.integers(1, 200_000)
COUNTS = st.integers(1, 600)
SECONDS = st.floats(0.001, 1e5, allow_subnormal=False)


@given(TOTALS, COUNTS)
def test_indices_are_the_published_rule(total, count):
    indices = frame_indices(total, count)
    assert indices == np.round(np.linspace(0, total - 1, count)).tolist()
    assert len(indices) == count and indices == sorted(indices)
    assert indices[0] == 0 and (count == 1 or indices[-1] == total - 1)
    assert len(set(indices)) == min(total, count)


@given(TOTALS, COUNTS)
def test_indices_are_as_far_apart_as_they_can_be(total, count):
    steps = np.diff(frame_indices(total, count))
    assert len(steps) == 0 or steps.max() - steps.min() <= 2


@given(TOTALS)
def test_all_frames_are_taken_when_as_many_are_asked_for(total):
    total = min(total, 5000)
    assert frame_indices(total, total) == list(range(total))


@given(TOTALS, COUNTS, SECONDS, st.floats(0, 1e5))
def test_every_frame_is_shown_inside_its_clip_half_a_frame_after_its_label(total, count, duration, start):
    media = Media(kind="video", start=start, end=start + duration, duration=duration, num_frames=total)
    labels, times = label_seconds(media, count), shown_seconds(media, count)
    assert labels[0] == 0 and all(0 <= label < duration for label in labels)
    assert all(start <= time <= start + duration for time in times)
    half = duration / total / 2
    assert np.allclose(np.subtract(times, labels), start + half, rtol=1e-9, atol=1e-9 * (start + duration))


@given(st.integers(1, 3000), COUNTS, st.sampled_from([24, 25, 30, 60, 24000 / 1001, 30000 / 1001, 29.9167]))
def test_at_a_constant_rate_the_frame_shown_is_the_one_of_that_number(total, count, fps):
    media = Media(kind="video", duration=total / fps, num_frames=total)
    assert [math.floor(time * fps) for time in shown_seconds(media, count)] == frame_indices(total, count)


@given(st.floats(0, 1e4), st.floats(0, 1e4), SECONDS, TOTALS)
def test_a_clip_lies_inside_its_file(start, length, duration, total):
    end = start + length if length else 0.0
    if start >= duration or end == start > 0:
        with pytest.raises(ValueError, match="nothing of a file"):
            clip_bounds(start, end, duration)
        return
    first, last = clip_bounds(start, end, duration)
    assert (first, last) == (start, min(end or duration, duration)) and first < last
    assert 1 <= clip_frames(first, last, duration, total) <= total


def test_neighbouring_clips_have_the_frames_of_the_whole():
    assert clip_frames(0.0, 4.0, 10.0, 250) + clip_frames(4.0, 10.0, 10.0, 250) == 250


@pytest.mark.parametrize(("total", "count"), [(0, 1), (5, 0), (-1, 3)])
def test_no_frame_is_the_callers_mistake(total, count):
    with pytest.raises(ValueError, match=f"{count} of {total} frames"):
        frame_indices(total, count)


@pytest.mark.parametrize("bounds", [{"fps": 0.0}, {"fps": math.nan}, {"min_frames": 0}, {"min_frames": 9}])
def test_a_rate_or_bounds_that_choose_no_frames_are_refused(bounds):
    with pytest.raises(ValueError, match="1 <= min_frames <= max_frames"):
        FrameRate(**bounds)


WISHES = st.fixed_dictionaries(
    {},
    optional={
        "fps": st.sampled_from([0.1, 1.0, 2.0, 30.0, 1e308]),
        "min_frames": st.integers(1, 40),
        "max_frames": st.integers(1, 900),
    },
)


def published(wishes, duration, total):
    """What qwen-vl-utils' `smart_nframes` chooses, its `total / fps` without rounding; None where it refuses."""
    if "nframes" in wishes:
        count = round(wishes["nframes"] / 2) * 2
    else:
        least = math.ceil(wishes.get("min_frames", 4) / 2) * 2
        most = wishes.get("max_frames", min(768, total)) // 2 * 2
        count = duration * wishes.get("fps", 2.0)
        count = math.floor(min(max(count, least), most, total) / 2) * 2
    return count if 2 <= count <= total else None


@given(WISHES | st.builds(lambda n: {"nframes": n}, st.integers(1, 900)), st.integers(1, 2000), st.integers(1, 500))
def test_wishes_of_a_record_choose_what_qwen_vl_utils_chooses(wishes, total, seconds):
    media = Media(kind="video", duration=float(seconds), num_frames=total, **wishes)
    chosen = EvenFrameRate().of(media).num_frames(media.duration, total)
    wanted = published(wishes, media.duration, total)
    if wanted is not None:
        assert chosen == wanted
    assert 1 <= chosen <= total and (chosen % 2 == 0 or total == 1), "where it refuses, as near as there are frames"


@given(WISHES, st.integers(1, 2000), st.integers(1, 500))
def test_other_models_count_single_frames(wishes, total, seconds):
    media = Media(kind="video", duration=float(seconds), num_frames=total, **wishes)
    chosen = FrameRate(fps=1.0, min_frames=2, max_frames=8).of(media).num_frames(media.duration, total)
    most = wishes.get("max_frames", 8)
    least = min(wishes.get("min_frames", 2), most)
    assert chosen == max(1, min(total, max(least, min(most, round(min(1e9, wishes.get("fps", 1.0) * seconds))))))
    assert FrameRate().of(Media(kind="video", nframes=37)).num_frames(2.0, 40) == 37
    assert FrameRate().of(Media(kind="video", nframes=37)).num_frames(2.0, 30) == 30
