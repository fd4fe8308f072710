"""A pretrained table gets the rows that a tokenizer needs; new tokens start as the mean of the known."""

import pytest
import torch

from eagle_train.model.embeddings import Vocabulary, fit_rows, tell


def table(rows=8, dtype=torch.float32):
    return torch.arange(rows * 3, dtype=dtype).reshape(rows, 3).clone()


def test_rows_are_added_as_the_mean_of_the_known():
    source = table()
    found = fit_rows(source, 10, Vocabulary(num_tokens=10, new=(8, 9)))
    assert torch.equal(found[:8], source)
    assert torch.equal(found[8:], source.mean(0).expand(2, 3))


def test_new_tokens_take_padding_first_and_padding_is_not_in_the_mean():
    source = table()  # 5 known tokens, 3 rows of padding, 2 of which become new tokens
    before = source.clone()
    found = fit_rows(source, 8, Vocabulary(num_tokens=7, new=(5, 6)))
    assert torch.equal(found[[0, 1, 2, 3, 4, 7]], before[[0, 1, 2, 3, 4, 7]])
    assert torch.equal(found[[5, 6]], before[:5].mean(0).expand(2, 3))
    assert torch.equal(source, before), "the source's file is mapped: it is not written to"


def test_new_tokens_in_padding_and_beyond_it_start_alike():
    found = fit_rows(table(), 10, Vocabulary(num_tokens=10, new=(6, 7, 8, 9)))
    assert torch.equal(found[6:], table()[:6].mean(0).expand(4, 3))


def test_new_tokens_among_the_others_are_not_in_the_mean():
    found = fit_rows(table(), 8, Vocabulary(num_tokens=8, new=(2,)))
    others = [0, 1, 3, 4, 5, 6, 7]
    assert torch.equal(found[2], table()[others].mean(0)) and torch.equal(found[others], table()[others])


def test_a_padded_table_is_kept_or_shrunk_as_asked():
    assert torch.equal(fit_rows(table(), 8, Vocabulary(num_tokens=5)), table())
    assert torch.equal(fit_rows(table(), 6, Vocabulary(num_tokens=5)), table()[:6])
    both = fit_rows(table(), 6, Vocabulary(num_tokens=6, new=(5,)))
    assert torch.equal(both[:5], table()[:5]) and torch.equal(both[5], table()[:5].mean(0))


def test_a_token_without_a_row_is_an_error_with_both_numbers():
    with pytest.raises(ValueError, match=r"tokenizer has 9 tokens, the LLM 8 rows for them; set llm\.vocab_size=9"):
        fit_rows(table(), 8, Vocabulary(num_tokens=9))


def test_a_vocabulary_of_new_tokens_only_is_an_error():
    with pytest.raises(ValueError, match="all 2 tokens of the tokenizer are new"):
        fit_rows(table(2), 2, Vocabulary(num_tokens=2, new=(0, 1)))


def test_the_mean_of_low_precision_is_taken_in_float32():
    torch.manual_seed(0)
    source = (torch.randn(5000, 4) + 3).to(torch.bfloat16)
    found = fit_rows(source, 5001, Vocabulary(num_tokens=5001, new=(5000,)))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[5000], source.double().mean(0).to(torch.bfloat16))


@pytest.mark.parametrize(
    ("num_rows", "vocabulary", "said"),
    [
        (8, Vocabulary(num_tokens=5), ""),
        (10, Vocabulary(num_tokens=10), "2 rows added to 8; new rows start as the mean of the known"),
        (6, Vocabulary(num_tokens=5), "2 of 8 rows dropped, which no token has"),
        (8, Vocabulary(num_tokens=7, new=(5, 6)), "2 new tokens; new rows start as the mean of the known"),
    ],
)
def test_what_is_done_is_told(num_rows, vocabulary, said):
    assert tell(table(), num_rows, vocabulary) == said
