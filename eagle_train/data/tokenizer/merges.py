"""From a vocabulary whose best piece merges first to the pair merges of a BPE tokenizer."""

from __future__ import annotations

from collections.abc import Sequence


def pair_merges(pieces: Sequence[str]) -> list[tuple[str, str]]:
    """Returns every pair of pieces whose concatenation is a piece too, in the order in which they merge.

    SentencePiece and tiktoken rank a merge by the piece it makes, the leftmost of equals first; `tokenizers` ranks
    pairs, each differently. So the pairs that make one piece follow each other, those with the better left part first
    (as in the model hub's conversions): only where two of them overlap in a text could that differ from the leftmost.

    Args:
        pieces: unique, best first, single characters included.
    """
    rank = {piece: place for place, piece in enumerate(pieces)}
    merges = []
    for piece in pieces:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in rank and pair[1] in rank]
        merges += sorted(known, key=lambda pair: (rank[pair[0]], rank[pair[1]]))
    return merges
