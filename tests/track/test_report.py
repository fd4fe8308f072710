"""The report: one file without outside references that shows what the run recorded, and says what is missing."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from eagle_train.tools.report import main
from eagle_train.track.curves import frames_chart
from eagle_train.track.report import MAX_IMAGES, THUMBNAIL, accounting_rows, facts, score_rows, write_report
from eagle_train.track.run_folder import read_run

SCORES = {
    "eval/exact_match/count": 0.875,
    "eval/exact_match/ink": 1.0,
    "eval/exact_match/simple": 0.9375,
    "eval_grey/exact_match/count": 0.25,
    "eval_grey/exact_match/simple": 0.3125,
    "eval_chance/exact_match/simple": 0.2,
}


def training_record(step):
    stage = "pretrain" if step <= 20 else "sft"
    loss = 4.0 * math.exp(-step / 30) + 0.1
    return {
        "step": step,
        "time": 1.7e9 + step,
        "stage": stage,
        "stage_step": step if step <= 20 else step - 20,
        "train/loss": loss,
        "train/loss/pages": loss * 1.1,
        "train/grad_norm": 1.0 + step % 3,
        "train/tokens_seen": 1000 * step,
        "lr/projector": 1e-3,
        "time/tokens_per_second": 2500.0,
        "time/step_seconds": 0.5,
        "time/data_wait_share": 0.02,
        "data/fill": 0.98,
        "memory/peak_rss_gib": 1.5,
    }


def write_gallery(folder):
    folder.mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "0000-0.png")
    Image.new("RGB", (900, 600), "blue").save(folder / "0001-0.png")
    (folder / "0002-0.png").write_bytes(b"not a picture")
    shared = {"type": "ink", "prediction_grey": "green"}
    many = ["0000-0.png"] * (MAX_IMAGES + 2)
    entries = [
        {"question": "Ink <b>?", "answer": "red", "prediction": "red", "images": ["0000-0.png"], "correct": True},
        {"question": "Two?", "answer": "blue", "prediction": "<script>", "images": ["0001-0.png"], "correct": False},
        {"question": "Three?", "answer": "x", "prediction": "", "images": ["0002-0.png", "gone.png"], "correct": False},
        {"question": "Many?", "answer": "y", "prediction": "y", "images": many, "correct": True},
    ]
    (folder / "gallery.json").write_text(json.dumps([shared | entry for entry in entries]))


@pytest.fixture
def run_dir(tmp_path):
    """The folder of a finished run of two stages."""
    run = tmp_path / "run"
    run.mkdir()
    records = [training_record(step) for step in range(1, 121)] + [{"step": 120, "time": 1.7e9 + 130} | SCORES]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (run / "config.yaml").write_text("name: tiny-eagle\nseed: 7\n")
    (run / "attempts.jsonl").write_text('{"attempt": 0, "ranks": 1}\n{"attempt": 1, "ranks": 2}\n')
    (run / "mixture.json").write_text(json.dumps({"sft": {"pages": {"asked": 0.75, "realized": 0.7321}}}))
    accounting = {
        "sft": {
            "pages": {"read": 1234, "used": 1200, "dropped": {"too_long": 30, "unreadable_image": 4}},
            "clips": {"read": 100, "used": 90, "dropped": {"too_long": 7}},
        }
    }
    (run / "accounting.json").write_text(json.dumps(accounting))
    write_gallery(run / "gallery")
    return run


class Page(HTMLParser):
    """The tags, attributes and text of a page; refuses tags that are closed out of order."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text.append(data)


def read_page(path):
    return Page(path.read_text(encoding="utf-8"))


def text_of(page):
    return re.sub(r"\s+", " ", " ".join(page.text))


def test_the_page_refers_to_nothing_outside_itself(run_dir):
    source = write_report(run_dir).read_text()
    page = Page(source)
    links = [value for _, name, value in page.attributes if name in ("src", "href", "xlink:href", "srcset", "action")]
    assert len(links) > 10
    assert all(value.startswith(("data:", "#")) for value in links)
    assert not re.findall(r"https?:|@import|url\(", source)


def test_every_section_shows_what_was_recorded(run_dir):
    page = read_page(write_report(run_dir))
    text = text_of(page)
    assert page.tags.count("svg") == 9
    for shown in ("tiny-eagle", "93.8%", "31% with grey images, 20% by chance", "2 starts, 2 ranks", "pretrain → sft"):
        assert shown in text
    for shown in ("87.5%", "25.0%", "75.0%", "73.2%", "-1.8", "1,234", "too_long 30", "seed: 7"):
        assert shown in text
    assert "yet" not in text


def test_the_summary_counts_steps_time_and_tokens(run_dir):
    values = {fact.label: fact.value for fact in facts(read_run(run_dir))}
    assert values["Optimizer steps"] == "120"
    assert values["Training time"] == "0:01:00"
    assert values["Tokens seen"] == "120k"
    last_tenth = [training_record(step)["train/loss"] for step in range(111, 121)]
    assert float(values["Final loss"]) == pytest.approx(sum(last_tenth) / 10, abs=1e-4)


def test_the_time_of_a_run_does_not_depend_on_how_often_it_is_logged(run_dir):
    path = run_dir / "metrics.jsonl"
    path.write_text("".join(line for line in path.read_text().splitlines(True) if json.loads(line)["step"] % 10 == 0))
    assert {fact.label: fact.value for fact in facts(read_run(run_dir))}["Training time"] == "0:01:00"


def test_books_that_do_not_balance_are_shown(run_dir):
    rows = accounting_rows(read_run(run_dir))
    assert [(row.source, row.unexplained) for row in rows] == [("pages", 0), ("clips", 3), ("", 3)]
    assert rows[-1].dropped == {"too_long": 37, "unreadable_image": 4}
    text = text_of(read_page(write_report(run_dir)))
    assert text.count("off by +3") == 2 and text.count("✓") > 1


def test_what_was_cut_off_too_long_samples_is_shown(run_dir):
    cuts = {"pages": {"samples": 2, "turns": 6, "tokens": 4321}, "clips": {"samples": 0, "turns": 0, "tokens": 0}}
    entry = {"read": 2, "used": 2, "dropped": {}}
    books = {"long": {source: entry | {"shortened": cut} for source, cut in cuts.items()}}
    (run_dir / "accounting.json").write_text(json.dumps(books))
    assert [row.shortened for row in accounting_rows(read_run(run_dir))] == [*cuts.values(), cuts["pages"]]
    text = text_of(read_page(write_report(run_dir)))
    assert text.count("shortened 2 by 6 turns, 4,321 tokens") == 2, "of the source and of all"


def test_what_the_used_samples_gave_is_shown(run_dir):
    entry = {"read": 2, "used": 2, "dropped": {}, "tokens": 4000, "targets": 100, "tiles": 7, "frames": 0}
    (run_dir / "accounting.json").write_text(json.dumps({"sft": {"pages": entry, "clips": entry | {"frames": 5}}}))
    assert [row.gave for row in accounting_rows(read_run(run_dir))] == [
        "4,000 tokens, 100 with loss, 7 tiles",
        "4,000 tokens, 100 with loss, 7 tiles, 5 frames",
        "8,000 tokens, 200 with loss, 14 tiles, 5 frames",
    ]
    assert "8,000 tokens, 200 with loss, 14 tiles, 5 frames" in text_of(read_page(write_report(run_dir)))


def test_scores_begin_with_the_average_and_go_from_best_to_worst(run_dir):
    rows = score_rows(read_run(run_dir))
    assert [(row.name, row.grey, row.chance) for row in rows] == [
        ("simple types, average", 0.3125, 0.2),
        ("ink", None, None),
        ("count", 0.25, None),
    ]


def test_accuracy_over_frames_is_drawn_and_shuffled_frames_have_a_column(run_dir):
    assert "shuffled" not in text_of(read_page(write_report(run_dir))).replace("Shuffled are the frames", "")
    scores = {f"eval_frames_{n}/exact_match/first": n / 8 for n in (1, 2, 8)}
    scores |= {"eval/exact_match/first": 0.95, "eval_shuffled/exact_match/first": 0.512}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 60, "time": 1.7e9} | scores) + "\n")
    chart = frames_chart(read_run(run_dir).scores)
    assert [line["points"] for line in chart.hover["lines"]] == [[[1, 12.5], [2, 25.0], [8, 100.0]]]
    assert chart.hover["x"] == "frame", "what the pointer is at is no step"
    text = text_of(read_page(write_report(run_dir)))
    assert "Accuracy by number of frames" in text and "51.2%" in text


def test_what_the_shares_of_a_mixture_are_of_is_said(run_dir):
    assert "sft samples pages" in " ".join(text_of(read_page(write_report(run_dir))).split())
    share = {"asked": 0.75, "realized": 0.7321, "of": "supervised_tokens"}
    (run_dir / "mixture.json").write_text(json.dumps({"sft": {"pages": share}}))
    assert "sft supervised tokens pages" in " ".join(text_of(read_page(write_report(run_dir))).split())


def test_gallery_images_are_inlined_and_small(run_dir):
    page = read_page(write_report(run_dir))
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    sizes = []
    for uri in images:
        data = base64.b64decode(uri.removeprefix("data:image/png;base64,"))
        with Image.open(io.BytesIO(data)) as image:
            sizes.append(image.size)
    assert sizes == [(40, 30), (THUMBNAIL, 171), *[(40, 30)] * MAX_IMAGES]
    assert text_of(page).count("image not found") == 2
    assert "2 more images" in text_of(page)


def test_gallery_marks_right_and_wrong_answers_and_gives_the_truth_of_wrong_ones(run_dir):
    page = read_page(write_report(run_dir))
    classes = [value for tag, name, value in page.attributes if (tag, name) == ("article", "class")]
    assert classes == ["sample right", "sample wrong", "sample wrong", "sample right"]
    assert "truth blue" in text_of(page) and "truth red" not in text_of(page)


def test_what_a_model_says_cannot_become_markup(run_dir):
    source = write_report(run_dir).read_text()
    assert "&lt;script&gt;" in source and "Ink &lt;b&gt;?" in source
    assert Page(source).tags.count("script") == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.yaml", "mixture.json", "accounting.json", "gallery"])
def test_a_part_that_is_missing_is_said(run_dir, name):
    (run_dir / name).rename(run_dir.parent / name)
    text = text_of(read_page(write_report(run_dir)))
    assert {
        "metrics.jsonl": "No training step is logged yet (metrics.jsonl)",
        "config.yaml": "No config.yaml",
        "mixture.json": "No mixture yet (mixture.json)",
        "accounting.json": "No accounts yet (accounting.json)",
        "gallery": "No held-out answers yet (gallery/gallery.json)",
    }[name] in text


def test_a_run_that_has_only_begun_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(training_record(1)) + "\n" + '{"step": 2, "ti')
    page = read_page(write_report(tmp_path))
    assert "circle" in page.tags
    assert "Not evaluated yet" in text_of(page)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No step is logged yet" in text_of(read_page(write_report(tmp_path)))


def test_a_loss_that_is_not_finite_does_not_stop_the_report(tmp_path):
    records = [training_record(step) | {"train/loss": None} for step in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = read_page(write_report(tmp_path))
    assert "Final loss" not in text_of(page) and "Loss by source" in text_of(page)


def test_a_folder_that_is_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"is not the folder of a run: it holds none of metrics\.jsonl"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is not the folder of a run"):
        write_report(tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_named(run_dir):
    (run_dir / "mixture.json").write_text('{"sft": ')
    with pytest.raises(ValueError, match=r"mixture\.json is not JSON"):
        write_report(run_dir)


def test_the_command_writes_where_it_is_told_and_prints_the_path(run_dir, tmp_path, capsys):
    assert main([str(run_dir)]) == 0
    assert main([str(run_dir), "--out", str(tmp_path / "new" / "page.html")]) == 0
    assert capsys.readouterr().out.split() == [str(run_dir / "report.html"), str(tmp_path / "new" / "page.html")]
    assert (tmp_path / "new" / "page.html").read_text() == (run_dir / "report.html").read_text()
