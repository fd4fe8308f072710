"""Grids of tiles are the exact argmax of the published formulas, and tiles the published pixels."""

import json
import math
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from eagle_train.data.tile_grids import ClosestAspectRatio, ImageAreaPreservation, grids
from eagle_train.train.config import build, load_config
from eagle_train.train.stage_data import describe
from eagle_train.types import MediaPlan

S = 448
RULES = {"area": ImageAreaPreservation, "ratio": ClosestAspectRatio}
rules = pytest.mark.parametrize("rule", RULES)
sides = st.one_of(
    st.integers(1, 40),
    st.integers(1, 100_000),
    st.sampled_from([S, 2 * S, 3 * S, 12 * S, 3675, 1, 27, 100_000]),
    st.integers(1, 30).map(lambda n: 7 * n),
)


def grid_of(rule, width, height, **options):
    plan = RULES[rule](tile_size=S, **options).plan(width, height)
    return plan.cols, plan.rows


def naive_area(width, height, min_tiles, max_tiles, tile):
    """Returns the first largest of the formula as it is written, in fractions."""
    ratio = Fraction(width, height)
    scores = {}
    for cols, rows in naive_order(min_tiles, max_tiles):
        area = min(Fraction(cols * rows * tile**2, width * height), Fraction(6, 10))
        scores[cols, rows] = area * min(Fraction(cols, rows) / ratio, ratio / Fraction(cols, rows))
    return max(scores, key=scores.__getitem__)  # the first of equals


def naive_ratio(width, height, min_tiles, max_tiles, tile):
    best, smallest = None, None
    for cols, rows in naive_order(min_tiles, max_tiles):
        difference = abs(Fraction(width, height) - Fraction(cols, rows))
        if best is None or difference < smallest:
            best, smallest = (cols, rows), difference
        elif difference == smallest and width * height > Fraction(1, 2) * tile**2 * cols * rows:
            best = cols, rows
    return best


NAIVE = {"area": naive_area, "ratio": naive_ratio}


def naive_order(min_tiles, max_tiles):
    pairs = [(c, r) for c in range(1, max_tiles + 1) for r in range(1, max_tiles + 1)]
    return sorted((p for p in pairs if min_tiles <= p[0] * p[1] <= max_tiles), key=lambda p: (p[0] * p[1], p[0]))


@rules
@given(sides, sides, st.integers(1, 6), st.integers(0, 30), st.sampled_from([S, 64, 7, 512]))
def test_the_grid_is_the_argmax_of_the_formula(rule, width, height, fewest, more, tile):
    plan = RULES[rule](tile_size=tile, min_tiles=fewest, max_tiles=fewest + more).plan(width, height)
    assert (plan.cols, plan.rows) == NAIVE[rule](width, height, fewest, fewest + more, tile)
    assert plan.thumbnail == (plan.rows * plan.cols > 1)


@rules
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(1, 900))
def test_ties_between_grids_are_the_formulas(rule, cols, rows, other_cols, other_rows, unit):
    # the ratio halfway between two grids, in the arithmetic and in the geometric sense
    for width, height in [
        (unit * (cols * other_rows + other_cols * rows), unit * 2 * rows * other_rows),
        (unit * cols, unit * rows),
        (unit * cols * other_cols, unit * rows * other_rows),
    ]:
        assert grid_of(rule, width, height) == NAIVE[rule](width, height, 1, 12, S)


@rules
@given(sides, sides, st.lists(st.integers(1, 24), min_size=2, max_size=6))
def test_a_higher_limit_never_gives_fewer_tiles(rule, width, height, limits):
    tiling = RULES[rule](tile_size=S, max_tiles=24)
    counts = [tiling.plan(width, height, limit).num_tiles for limit in sorted(limits)]
    assert counts == sorted(counts)
    assert all(count <= limit + (count > 1) for count, limit in zip(counts, sorted(limits), strict=True))


VECTORS = {
    (448, 448): (1, 1),
    (578, 578): (1, 1),
    (579, 579): (2, 2),
    (640, 480): (4, 3),
    (1000, 1000): (2, 2),
    (1280, 720): (4, 2),
    (1920, 1080): (4, 2),
    (1080, 1920): (2, 4),
    (2480, 3508): (3, 4),
    (3840, 2160): (4, 3),
    (4000, 3000): (4, 3),
    (300, 2000): (1, 7),
    (5000, 500): (10, 1),
    (1344, 896): (3, 2),
    (4096, 4096): (3, 3),
    (336, 1008): (1, 3),
    (1, 1): (1, 1),
    (100_000, 1): (12, 1),
    (1, 100_000): (1, 12),
    (27, 1): (12, 1),
    (1, 27): (1, 12),
    (3675, 3675): (3, 3),
}


@pytest.mark.parametrize("size", VECTORS)
def test_published_grids_of_image_area_preservation(size):
    assert grid_of("area", *size) == VECTORS[size]


@pytest.mark.parametrize(
    ("rule", "size", "most", "wanted"),
    [
        ("area", (640, 480), 6, (3, 2)),
        ("area", (1920, 1080), 6, (3, 2)),
        ("area", (300, 2000), 6, (1, 6)),
        ("ratio", (1000, 1000), 12, (3, 3)),
        ("ratio", (2480, 3508), 12, (2, 3)),
        ("ratio", (3840, 2160), 12, (4, 2)),
        ("ratio", (640, 480), 12, (4, 3)),
        ("ratio", (448, 448), 12, (1, 1)),
    ],
)
def test_published_grids_of_the_other_settings(rule, size, most, wanted):
    assert grid_of(rule, *size, max_tiles=most) == wanted
    plan = RULES[rule](tile_size=S).plan(*size, most)
    assert (plan.cols, plan.rows) == wanted


def test_a_limit_below_the_fewest_tiles_is_obeyed():
    tiling = ImageAreaPreservation(tile_size=S, min_tiles=4, max_tiles=12)
    assert tiling.plan(448, 448).num_tiles == 5
    assert tiling.plan(448, 448, 1) == MediaPlan()
    assert tiling.plan(4480, 4480, 99) == tiling.plan(4480, 4480)


def test_candidates_are_all_grids_in_order():
    assert grids(1, 4) == ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4), (2, 2), (4, 1))
    assert list(grids(3, 40)) == naive_order(3, 40)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tiles": 0}, "min_tiles 1 and max_tiles 0"),
        ({"min_tiles": 13}, "min_tiles 13 and max_tiles 12"),
        ({"resample": "cubic"}, "'cubic' is none of .*'bicubic'"),
    ],
)
def test_what_leaves_no_grid_is_refused(options, said):
    with pytest.raises(ValueError, match=said):
        ImageAreaPreservation(tile_size=S, **options)
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        ImageAreaPreservation(tile_size=S).plan(0, 5)
    with pytest.raises(ValueError, match="at most 0 tiles"):
        ImageAreaPreservation(tile_size=S).plan(5, 5, 0)


def photo(width, height):
    noise = np.random.default_rng(width * height).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BILINEAR)


def cut(tiling, image, plan=None):
    plan = plan or tiling.plan(*image.size)
    out = np.full((plan.num_tiles, 3, tiling.tile_size, tiling.tile_size), 77, np.uint8)
    tiling.cut(image, plan, out)
    return plan, out


@rules
@pytest.mark.parametrize(
    "size", [(200, 100), (90, 300), (33, 33), (700, 500), (1, 1), (27, 1), (1, 300), (40, 9000), (9000, 40)]
)
@pytest.mark.parametrize("resample", ["bicubic", "lanczos"])
def test_tiles_are_pillows_resize_and_crops_with_the_thumbnail_last(rule, size, resample):
    tiling = RULES[rule](tile_size=32, max_tiles=6, resample=resample)
    image = photo(*size)
    plan, tiles = cut(tiling, image)
    method = Image.Resampling[resample.upper()]
    whole = image.resize((plan.cols * 32, plan.rows * 32), method)
    boxes = [(c * 32, r * 32, c * 32 + 32, r * 32 + 32) for r in range(plan.rows) for c in range(plan.cols)]
    wanted = [np.array(whole.crop(box)) for box in boxes]
    if len(boxes) > 1:
        wanted.append(np.array(image.resize((32, 32), method)))
    np.testing.assert_array_equal(tiles, np.stack(wanted).transpose(0, 3, 1, 2))


def test_a_frame_is_one_tile_whatever_its_size():
    tiling = ImageAreaPreservation(tile_size=32)
    frame = photo(300, 100)
    _, tiles = cut(tiling, frame, MediaPlan())
    np.testing.assert_array_equal(
        tiles[0], np.array(frame.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    )


def test_tiles_may_be_part_of_a_larger_array():
    tiling = ImageAreaPreservation(tile_size=16)
    image = photo(100, 50)
    plan, wanted = cut(tiling, image)
    row = np.full((plan.num_tiles + 3, 3, 16, 16), 77, np.uint8)
    tiling.cut(image, plan, row[2:-1])
    np.testing.assert_array_equal(row[2:-1], wanted)
    assert (row[:2] == 77).all() and (row[-1] == 77).all()


def test_an_array_of_another_shape_is_refused():
    tiling = ImageAreaPreservation(tile_size=16)
    with pytest.raises(ValueError, match=r"needs an array \(1, 3, 16, 16\), out is \(2, 3, 16, 16\)"):
        tiling.cut(photo(16, 16), MediaPlan(), np.zeros((2, 3, 16, 16), np.uint8))


def test_an_image_over_the_limit_is_cut_like_one_under_it(monkeypatch):
    tiling = ImageAreaPreservation(tile_size=32)
    image = photo(300, 1860)
    plan, plain = cut(tiling, image)
    monkeypatch.setattr("eagle_train.data.tile_grids.LARGEST_SIDE", math.isqrt(plan.cols * 32 * 1860 // 2))
    _, reduced = cut(tiling, image)
    difference = np.abs(plain.astype(int) - reduced)
    assert 0 < difference.max() <= 12


MEASURE = """
import resource
import numpy as np
from PIL import Image
from eagle_train.data.tile_grids import ImageAreaPreservation
tiling = ImageAreaPreservation(tile_size=448)
out = np.zeros((13, 3, 448, 448), np.uint8) + np.uint8(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for size in [(1_000_000, 1), (1, 1_000_000), (3, 1_000_000)]:
    image, plan = Image.new("RGB", size, (200, 100, 50)), tiling.plan(*size)
    tiling.cut(image, plan, out[: plan.num_tiles])
    assert plan.num_tiles == 13 and (out == np.array([200, 100, 50], np.uint8)[:, None, None]).all()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
def test_a_strip_of_any_length_takes_little_memory():
    command = [sys.executable, "-c", MEASURE]
    mebibytes = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert mebibytes < 300  # 448 x 1,000,000 pixels in between would be 1.8 GB


@rules
def test_everything_that_decides_the_pixels_is_part_of_the_identity(rule):
    kinds = [RULES[rule](tile_size=32, **o) for o in ({}, {"max_tiles": 6}, {"thumbnail": False}, {"min_tiles": 2})]
    kinds += [RULES[rule](tile_size=64), RULES[rule](tile_size=32, resample="lanczos")]
    told = {json.dumps(describe(tiling)) for tiling in kinds}
    assert len(told) == len(kinds)


@pytest.mark.parametrize(("group", "rule"), [("eagle2", "area"), ("internvl", "ratio")])
def test_the_config_groups_give_the_published_settings(group, rule):
    tiling = build(load_config(["+experiment=toy", f"data={group}", "data.tile_size=448"])["data"]).tiling
    assert type(tiling) is RULES[rule]
    assert vars(tiling) == vars(RULES[rule](tile_size=S, max_tiles=12, min_tiles=1, thumbnail=True))
