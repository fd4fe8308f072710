"""The preview shows the tokens and tiles of the run's own rows, and colours what is learnt, not one token more."""

import re
import shutil
from html.parser import HTMLParser

import pytest
import torch

from eagle_train.tools import data as data_tool
from eagle_train.tools.data_arguments import experiment_rows
from eagle_train.tools.preview_rows import learnt_tokens, spell
from eagle_train.train.assemble import load_tokenizer
from eagle_train.types import IGNORE_INDEX
from tests.runs import overrides


class Page(HTMLParser):
    """The texts of a page by sample: (text, whether it is learnt) of each token, and its images."""

    def __init__(self, text):
        super().__init__()
        self.samples, self.images, self.scripts = [], [], 0
        self._token = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "article":
            self.samples.append([])
        if tag == "i" and "title" in attrs:
            self._token = ["", "l" in (attrs.get("class") or "").split()]
        if tag == "img":
            self.images.append(attrs["src"])
        self.scripts += tag == "script"

    def handle_data(self, data):
        if self._token is not None:
            self._token[0] += data

    def handle_endtag(self, tag):
        if tag == "i" and self._token is not None:
            self.samples[-1].append(tuple(self._token))
            self._token = None


def preview(tmp_path, *arguments):
    out = tmp_path / "page.html"
    assert data_tool.main(["preview", *arguments, "--out", str(out)]) == 0
    return out.read_text()


@pytest.fixture
def text_of():
    return lambda tokens, learnt=None: "".join(text for text, is_learnt in tokens if learnt in (None, is_learnt))


@pytest.mark.slow
def test_the_page_shows_the_rows_of_the_plan(data, tmp_path, text_of):
    page = preview(tmp_path, *overrides(data, tmp_path), "--rows", "3", "--first", "1")
    assert re.findall(r'id="row(\d+)"', page) == ["1", "2", "3"]
    parsed = Page(page)
    assert len(parsed.samples) > 6 and len(parsed.images) > 3
    assert all(image.startswith("data:image/") for image in parsed.images)
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page)  # nothing is loaded from elsewhere
    for sample in parsed.samples:
        turns = re.findall(r"<\|assistant\|>(.*?<\|end\|>)", text_of(sample), re.DOTALL)
        assert turns and text_of(sample, True) == "".join(turns)
    (rows,) = experiment_rows(overrides(data, tmp_path), "sft")
    assert f"of {rows.layout.max_length} tokens" in page


def test_text_of_a_sample_cannot_become_markup(data, tmp_path, capsys):
    own = tmp_path / "own"
    own.mkdir()
    evil = "</i><script>alert(1)</script> & <b> ünï\t码"
    (own / "a.jsonl").write_text(
        "\n".join(f'{{"question": "{evil} {n}?", "answer": "{evil}"}}'.replace("\t", "\\t") for n in range(4))
    )
    assert data_tool.main(["build", "name=evil", f"annotation={own}/a.jsonl", f"out={own}"]) == 0
    given = [each for each in overrides(data, tmp_path) if "recipe=" not in each]
    recipes = [f"schedule.{stage}.recipe={own}/evil.yaml" for stage in ("pretrain", "sft")]
    parsed = Page(preview(tmp_path, *given, *recipes, "--rows", "1"))
    assert parsed.scripts == 1  # the page's own
    for sample in parsed.samples:
        assert "".join(text for text, learnt in sample if learnt) == f"{evil}<|end|>"


def test_bad_samples_and_lost_turns_are_shown_with_their_reason(data, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(data, root, ignore=shutil.ignore_patterns("*.arrow"))
    tar = root / "small_shapes" / "small_shapes-000000.tar"
    content = bytearray(tar.read_bytes())
    for match in re.finditer(rb"IDAT", bytes(content)):
        content[match.end() + 20] ^= 0xFF  # headers stay whole: it shows when pixels are decoded
    tar.write_bytes(bytes(content))
    text = root / "small_text" / "small_text-000000.tar"
    text.write_bytes(text.read_bytes().replace(b'"assistant"', b'"assistent"', 1))
    page = preview(
        tmp_path,
        *overrides(root, tmp_path, "schedule.sft.max_length=60", "schedule.sft.rows_per_step=3"),
        "data.too_long._target_=eagle_train.data.too_long.KeepTurns",
        "--rows",
        "60",
    )
    assert "unreadable_image" in page and "cut to fit: 2 turns" in page
    left = page[page.index('id="left"') :]
    assert "bad_record" in left and "assistent" in left
    assert "small_shapes/small_shapes-000000/" in page


def test_rows_that_are_not_there_are_refused(data, tmp_path):
    given = overrides(data, tmp_path, "schedule.sft.num_steps=null", "schedule.sft.num_epochs=1")
    with pytest.raises(ValueError, match="no row 5000"):
        preview(tmp_path, *given, "--first", "5000")
    with pytest.raises(ValueError, match="no stage 'tune'"):
        preview(tmp_path, *given, "--stage", "tune")


def test_a_label_that_is_not_the_next_token_is_refused():
    ids = torch.tensor([5, 6, 7, 8])
    labels = torch.tensor([IGNORE_INDEX, 7, 8, IGNORE_INDEX])
    assert learnt_tokens(ids, labels, "k") == [False, False, True, True]
    with pytest.raises(ValueError, match="k: 1 labels are not the next token"):
        learnt_tokens(ids, torch.tensor([IGNORE_INDEX, 7, 6, IGNORE_INDEX]), "k")


def test_tokens_spell_the_text_exactly(data):
    tokenizer = load_tokenizer(str(data / "tokenizer"))
    text = "<|user|>  ünï 码 \n\t🙂x<|end|>"
    ids = tokenizer.encode(text, add_special_tokens=False)
    tokens = spell(tokenizer, ids, [False] * len(ids))
    assert "".join(token.text for token in tokens) == text
    assert [index for token in tokens for index in token.ids] == ids
    assert [token.text for token in tokens if token.special] == ["<|user|>", "<|end|>"]
    half = tokenizer.encode("🙂", add_special_tokens=False)[:2]  # bytes that are no character lose none of what follows
    tokens = spell(tokenizer, [*half, *ids], [True, *[False] * (len(ids) + 1)])
    assert "".join(token.text for token in tokens).endswith(text)
    assert [index for token in tokens for index in token.ids] == [*half, *ids]


def test_what_was_asked_and_what_a_row_has_room_for_are_shown(data, tmp_path):
    own = ["degrade=ads", "degrade.frames={fps: 4.0, min_frames: 2, max_frames: 64}", "schedule.sft.max_length=110"]
    page = preview(tmp_path, *overrides(data, tmp_path, *own), "--rows", "40")
    chosen = re.findall(r"video 1: (\d+) of (\d+) frames \((\d+) of \2 frames asked\)", page)
    assert chosen and all(2 <= int(got) < int(wish) for got, _, wish in chosen)
    told = re.findall(r"media: ([\d,]+) tokens of ([\d,]+) that text leaves, ([\d,]+) asked", page)
    assert told and all(int(used) <= min(int(budget), int(wish)) for used, budget, wish in told)
    assert any(int(wish) > int(budget) for _, budget, wish in told), "some asked for more"
    frames = re.findall(r"</div>video 1, frame (\d+) of (\d+), \d+ tokens", page)
    assert len(frames) == sum(int(of) for number, of in frames if number == "1") > 2
    assert "that text leaves" not in preview(tmp_path, *overrides(data, tmp_path), "--rows", "2")
