"""Rows of an LLM's tables of tokens - embeddings and LM head - for the tokens of a run's tokenizer.

A table may have more rows than there are tokens: Qwen 2.5's have 151936 or 152064 rows for 151665 tokens. The others
are padding that no token refers to; tokens that are added to the tokenizer take such rows before the table grows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""Tensors of an LLM with one row per token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The tokens of a run's tokenizer, as far as rows are concerned."""

    num_tokens: int
    new: tuple[int, ...] = ()
    """Ids of the tokens that the pretrained LLM never saw."""


def fit_rows(table: torch.Tensor, num_rows: int, vocabulary: Vocabulary) -> torch.Tensor:
    """Returns a pretrained table (V, H) with `num_rows` rows; those of new tokens are the mean of all known tokens'.

    Rows that are added are that mean too. Other rows keep their values: padding stays, unless `num_rows` is less.
    The mean is taken in float32.

    Args:
        vocabulary: of the tokenizer; its tokens that have a row and are not new are the known ones.

    Raises:
        ValueError: if `num_rows` leaves a token without a row, or no token is known.

    Source: Eagle 2.5's training code starts the output rows of its special tokens so; LLaVA and Eagle 1 both tables.
    """
    if vocabulary.num_tokens > num_rows:
        raise ValueError(
            f"the tokenizer has {vocabulary.num_tokens} tokens, the LLM {num_rows} rows for them; "
            f"set llm.vocab_size={vocabulary.num_tokens} or more"
        )
    with_row = min(len(table), vocabulary.num_tokens)
    new = [token for token in vocabulary.new if token < with_row]
    if num_rows <= len(table) and not new:
        return table[:num_rows]
    known = with_row - len(new)
    if known == 0:
        raise ValueError(f"all {with_row} tokens of the tokenizer are new: there is no known row to start them from")
    # Subtracted, not selected: a selection would copy a table of a gigabyte.
    total = table[:with_row].sum(0, dtype=torch.float32) - table[new].sum(0, dtype=torch.float32)
    mean = (total / known).to(table.dtype)
    rows = torch.cat([table[:num_rows], mean.expand(max(num_rows - len(table), 0), -1)])
    rows[new] = mean
    return rows


def tell(table: torch.Tensor, num_rows: int, vocabulary: Vocabulary) -> str:
    """Returns what `fit_rows` does to a table, for the terminal; nothing if that is nothing."""
    added = num_rows - len(table)
    changes = [
        f"{added} rows added to {len(table)}" if added > 0 else "",
        f"{-added} of {len(table)} rows dropped, which no token has" if added < 0 else "",
        f"{len(vocabulary.new)} new tokens" if vocabulary.new else "",
    ]
    told = ", ".join(change for change in changes if change)
    return f"{told}; new rows start as the mean of the known" if added > 0 or vocabulary.new else told
