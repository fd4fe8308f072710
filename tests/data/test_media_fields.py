"""Clips, lists of frames, and documents: every released form becomes the same media; what is unclear is named."""

import json

import pytest

from eagle_train.data.placeholders import MediaRef
from eagle_train.data.schemas import parse_members, parse_record, stored_names, to_canonical
from eagle_train.types import SampleError

WHOLE = MediaRef("video", "v.mp4")
CLIP = MediaRef("video", "v.mp4", start=3.0, end=9.5)
FRAMES = MediaRef("video", refs=("f/0.jpg", "f/1.jpg", "f/2.jpg"))
RATED = MediaRef("video", refs=FRAMES.refs, fps=2.0)
SIZED = MediaRef("image", "a.jpg", limits=(("resized_width", 420), ("resized_height", 280)))
LIMITED = MediaRef("image", "a.jpg", limits=(("max_pixels", 50176),))
PAGES = MediaRef("document", refs=("p0.png", "p1.png"))


def asking(**wishes):
    return MediaRef("video", "v.mp4", limits=tuple(wishes.items()))


def llava(question, **fields):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "So."}]
    return {"conversations": turns, **fields}


def typed(*parts, **fields):
    content = [*parts, {"type": "text", "text": "Why?"}]
    return {
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "So."}],
        **fields,
    }


FORMS = {
    "path": (llava("<video>Why?", video="v.mp4"), WHOLE),
    "documented clip": (llava("<video>Why?", video={"path": "v.mp4", "start": 3, "end": 9.5}), CLIP),
    "clip as the code reads it": (
        llava("<video>Why?", video={"video": "v.mp4", "start_time": 3.0, "end_time": 9.5}),
        CLIP,
    ),
    "clip in a list": (llava("<video>Why?", video_list=[{"path": "v.mp4", "start": 3, "end": 9.5}]), CLIP),
    "clip in data": (
        llava("<video-1>Why?", data=[{"type": "video", "video_list": [{"path": "v.mp4", "start": 3, "end": 9.5}]}]),
        CLIP,
    ),
    "typed clip": (typed({"type": "video", "video": "v.mp4", "video_start": 3, "video_end": 9.5}), CLIP),
    "typed object": (typed({"type": "video", "video": {"path": "v.mp4", "start": 3, "end": 9.5}}), CLIP),
    "to the end": (llava("<video>Why?", video={"path": "v.mp4", "start": 3}), MediaRef("video", "v.mp4", start=3.0)),
    "from the start": (
        llava("<video>Why?", video={"path": "v.mp4", "end": 3, "start": None}),
        MediaRef("video", "v.mp4", end=3.0),
    ),
    "frames": (llava("<video>Why?", video=list(FRAMES.refs)), FRAMES),
    "list of frames": (llava("<video>Why?", video_list=[list(FRAMES.refs)]), FRAMES),
    "a list of one GIF, a video itself": (llava("<video>Why?", videos=["v.gif"]), MediaRef("video", "v.gif")),
    "frames with a rate": (llava("<video>Why?", video={"frames": list(FRAMES.refs), "fps": 2}), RATED),
    "typed frames": (typed({"type": "video", "video": list(FRAMES.refs), "fps": 2.0}), RATED),
    "frames called images": (llava("<image>Why?", video=list(FRAMES.refs)), FRAMES),
    "frames with their rate in Qwen's words": (
        typed({"type": "video", "video": list(FRAMES.refs), "sample_fps": "2.0"}),
        RATED,
    ),
    "a rate to sample a file with": (typed({"type": "video", "video": "v.mp4", "fps": 0.5}), asking(fps=0.5)),
    "a number of frames": (
        typed({"type": "video_url", "video_url": {"url": "v.mp4"}, "nframes": 7}),
        asking(nframes=7),
    ),
    "bounds of a rate": (
        typed({"type": "video", "video": "v.mp4", "fps": 2, "min_frames": 2, "max_frames": 9, "total_pixels": 7840}),
        asking(min_frames=2, max_frames=9, total_pixels=7840, fps=2.0),
    ),
    "a clip with a rate": (
        llava("<video>Why?", video={"path": "v.mp4", "start": 3, "end": 9.5, "fps": 1}),
        MediaRef("video", "v.mp4", start=3.0, end=9.5, limits=(("fps", 1.0),)),
    ),
    "some of the frames": (
        typed({"type": "video", "video": list(FRAMES.refs), "fps": 2.0, "nframes": 2}),
        MediaRef("video", refs=FRAMES.refs, fps=2.0, limits=(("nframes", 2),)),
    ),
    "sized": (typed({"type": "image", "image": "a.jpg", "resized_height": 280, "resized_width": 420}), SIZED),
    "limited": (typed({"type": "image_url", "image_url": {"url": "a.jpg"}, "max_pixels": 50176}), LIMITED),
    "limited object": (llava("<image>Why?", image={"path": "a.jpg", "max_pixels": 50176}), LIMITED),
    "limited frames": (
        typed({"type": "video", "video": list(FRAMES.refs), "min_pixels": 784}),
        MediaRef("video", refs=FRAMES.refs, limits=(("min_pixels", 784),)),
    ),
    "document": (llava("<document>Why?", document=list(PAGES.refs)), PAGES),
    "documents": (llava("<document-1>Why?", documents=[list(PAGES.refs)]), PAGES),
    "pages": (llava("Why?", document={"pages": list(PAGES.refs)}), PAGES),
    "typed document": (typed({"type": "document", "document": list(PAGES.refs)}), PAGES),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_medium_is_read_and_survives_a_round_trip(form):
    record, expected = FORMS[form]
    parsed = parse_record(record, key="k")
    assert parsed.media == (expected,)
    assert parsed.messages[0].content[0] == 0 and parsed.meta == {}
    names = stored_names(parsed.media)
    members = dict.fromkeys(names, b"") | {"json": json.dumps(to_canonical(parsed, names)).encode()}
    again = parse_members(members, key="k")
    (medium,) = again.media
    assert (again.messages, list(medium.paths)) == (parsed.messages, names)
    assert (medium.kind, medium.start, medium.end, medium.fps, medium.limits) == (
        expected.kind, expected.start, expected.end, expected.fps, expected.limits,
    )  # fmt: skip
    assert bool(medium.refs) == bool(expected.refs)


def test_several_media_of_every_kind_keep_their_order():
    record = parse_record(
        llava(
            "<document-2> <video> <image> <document-1> <video>",
            image="a.jpg",
            video=[{"path": "v.mp4", "start": 3, "end": 9.5}, list(FRAMES.refs)],
            documents=[["x.png"], list(PAGES.refs)],
        ),
        key="k",
    )
    assert record.media == (PAGES, CLIP, MediaRef("image", "a.jpg"), MediaRef("document", refs=("x.png",)), FRAMES)
    assert stored_names(record.media) == [
        "0.0.png", "0.1.png", "1.mp4", "2.jpg", "3.0.png", "4.0.jpg", "4.1.jpg", "4.2.jpg",
    ]  # fmt: skip


def test_a_tag_named_document_is_text_where_no_document_is_listed():
    record = parse_record(llava("<image>Read <document>this</document>.", image="a.jpg"), key="k")
    assert record.messages[0].content == (0, "Read <document>this</document>.")


def test_what_a_clip_set_tells_beside_the_conversation_becomes_meta():
    # The parts that the Eagle 2.5 paper describes of Eagle-Video-110K, which is not released.
    told = {"level": "clip", "question_type": "order", "anchor": {"start": 4.0, "end": 6.0}}
    record = parse_record(
        llava("<video>\nWhy?", id="x", video={"path": "v.mp4", "start": 3, "end": 9.5}, **told), key="k"
    )
    assert record.media == (CLIP,) and record.meta == {"id": "x", **told}


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"video": {"path": "v.mp4", "start": 9, "end": 9}}, "from 9.0 s to 9.0 s"),
        ({"video": {"path": "v.mp4", "end": 0}}, "from 0.0 s to 0.0 s"),
        ({"video": {"path": "v.mp4", "start": "00:03"}}, "'start': '00:03'"),
        ({"video": {"path": "v.mp4", "start": -1}}, "'start': -1"),
        ({"video": {"path": "v.mp4", "end": float("nan")}}, "'end': nan"),
        ({"video": {"path": "v.mp4", "start": True}}, "'start': True"),
        ({"video": {"path": "v.mp4", "start": 1, "start_time": 2}}, "is one number"),
        ({"video": {"path": "v.mp4", "begin": 1}}, "['begin']"),
        ({"video": {"path": "v.mp4", "video": "w.mp4"}}, "in one field"),
        ({"video": {"start": 1}}, "in one field"),
        ({"video": {"path": "v.mp4", "fps": 0}}, "fps 0.0"),
        ({"video": {"path": "v.mp4", "fps": 2, "nframes": 8}}, "by fps or by nframes"),
        ({"video": {"path": "v.mp4", "nframes": 2.0}}, "'nframes': 2.0"),
        ({"video": {"path": "v.mp4", "max_frames": 0}}, "'max_frames': 0"),
        ({"video": {"path": "v.mp4", "total_pixels": 1 << 31}}, "'total_pixels': 2147483648"),
        ({"video": {"path": "v.mp4", "min_frames": 9, "max_frames": 8}}, "min_frames 9 above max_frames 8"),
        ({"video": {"path": "v.mp4", "fps": 2, "sample_fps": 2}}, "is one number"),
        ({"video": {"frames": ["0.jpg"], "sample_fps": "fast"}}, "'sample_fps': 'fast'"),
        ({"image": {"path": "a.jpg", "fps": 1}}, "fps 1.0; it is a rate above 0, of a video"),
        ({"image": {"path": "a.jpg", "nframes": 1}}, "only a video has frames"),
        ({"video": {"frames": ["0.jpg"], "fps": 0}}, "fps 0.0"),
        ({"video": {"frames": ["0.jpg"], "end": 3}}, "only a video file has clips"),
        ({"video": {"frames": []}}, "media are named by path strings"),
        ({"video": {"frames": ["0.jpg", 7]}}, "holds 7"),
        ({"image": {"path": "a.jpg", "start": 1}}, "only a video file has clips"),
        ({"image": {"lmdb_file": "x.lmdb", "lmdb_key": "k"}}, "LMDB 'x.lmdb'"),
        ({"image": {"path": "a.jpg", "max_pixels": 0}}, "'max_pixels': 0"),
        ({"image": {"path": "a.jpg", "max_pixels": 50176.0}}, "whole number of pixels"),
        ({"image": {"path": "a.jpg", "min_pixels": 9, "max_pixels": 8}}, "min_pixels 9 above max_pixels 8"),
        ({"image": {"path": "a.jpg", "resized_width": 28}}, "given together"),
        ({"document": "a.pdf"}, "list of its pages"),
        ({"documents": ["a.pdf", "b.pdf"]}, "list of its pages"),
    ],
)
def test_media_that_are_unclear_are_bad_records_that_name_the_field(fields, named):
    with pytest.raises(SampleError) as error:
        parse_record(llava("Why?", **fields), key="k")
    assert error.value.reason == "bad_record" and named in error.value.detail


def test_a_page_that_is_no_member_is_named():
    canonical = to_canonical(parse_record(llava("Why?", document=list(PAGES.refs)), key="k"), ["0.0.png", "0.1.png"])
    with pytest.raises(SampleError, match=r"missing_media.*'0\.1\.png'"):
        parse_members({"0.0.png": b"", "json": json.dumps(canonical).encode()}, key="k")
