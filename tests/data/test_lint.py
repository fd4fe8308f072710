"""Lint names each defect by its kind, once per sample, and passes what is sound."""

import numpy as np
import pytest

from eagle_train.data.lint import KINDS, TextChecks, check_texts
from eagle_train.data.lint_files import repeated
from eagle_train.data.schemas import parse_record
from eagle_train.types import REASONS

PLAIN = TextChecks()


def kinds(question, answer, image=None, checks=PLAIN, more=()):
    record = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}, *more]}
    record |= {"image": image} if image else {}
    return {finding.kind for finding in check_texts(parse_record(record, key="k"), checks)}


@pytest.mark.parametrize(
    "question, answer, image, kind",
    [
        ("What is <image> this?", "a dog", None, "placeholder_as_text"),
        ("What is this?", "a <image-2> dog", None, "placeholder_in_answer"),
        ("What is this?", "<image> a dog", "a.jpg", "media_in_answer"),
        ("Say it.<|im_start|>assistant", "no", None, "role_marker"),
        ("Say it.", "[INST] no", None, "role_marker"),
        ("Say it. USER: again", "no", None, "role_marker"),
        ("Say it.", "no\n### Assistant: yes", None, "role_marker"),
        ("  ", "a dog", None, "empty_question"),
        ("a dog\n", "a dog", None, "answer_is_question"),
        ("Tom &amp; Jerry", "a cat", None, "markup"),
        ("Where?", "in a cafÃ© there", None, "mojibake"),
        ("Where?", "itâ€™s here", None, "mojibake"),
    ],
)
def test_every_odd_text_is_found_by_its_kind(question, answer, image, kind):
    assert kinds(question, answer, image) == {kind}


@pytest.mark.parametrize(
    "question, answer, image",
    [
        ("<image>\nWhat is this?", "a dog", "a.jpg"),
        ("What do users and assistants do? A user: someone.", "They talk; see #3.", None),
        ("Is 3 < 4 && 5 > 4?", "Yes: 3 < 4 & 5 > 4, a café's señor Ângelo", None),
        ("# Title\n## Part", "x <s1> [1]", None),
    ],
)
def test_sound_texts_pass(question, answer, image):
    assert kinds(question, answer, image) == set()


def test_special_tokens_of_the_tokenizer_and_long_texts_are_found():
    checks = TextChecks(special_tokens=["<|end|>", "<pad>"], max_characters=30)
    assert kinds("a <pad> b", "c", checks=checks) == {"special_token"}
    assert kinds("a <pad> b", "c") == set()
    assert kinds("a" * 30, "c", checks=checks) == {"long_text"}


def test_one_empty_answer_of_several_is_a_warning():
    more = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": " "}]
    assert kinds("What?", "a dog", more=more) == {"empty_answer"}
    assert not KINDS["empty_answer"].is_error


def test_every_reason_of_a_dropped_sample_is_an_error_kind():
    assert {reason for reason in REASONS if reason != "quarantined"} <= {k for k, v in KINDS.items() if v.is_error}


def test_repeated_hashes_point_at_the_first_of_their_kind():
    hashes = np.array([5, 0, 7, 5, 0, 7, 5], dtype=np.uint64)
    places, firsts = repeated(hashes)
    assert sorted(zip(places.tolist(), firsts.tolist(), strict=True)) == [(3, 0), (5, 2), (6, 0)]
    assert len(repeated(hashes[:0])[0]) == 0
