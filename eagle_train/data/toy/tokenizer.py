"""Trains the toy model's tokenizer: byte-level BPE, so that any text goes through it and back unchanged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

PAD_TOKEN = "<pad>"
END_TOKEN = "<|end|>"
NUM_BYTES = 256


def train_tokenizer(texts: Iterable[str], out: Path, *, vocab_size: int, special_tokens: Sequence[str]) -> None:
    """Writes a tokenizer folder that `transformers.AutoTokenizer.from_pretrained` reads.

    Special tokens get the first ids in their order, then come the 256 bytes, then the merges; digits stay
    single.

    Args:
        texts: what merges are learnt from; equal texts give an equal tokenizer.
        out: folder, created if needed.
        vocab_size: upper bound of the number of tokens, special ones included.
        special_tokens: must name `<pad>` (padding) and `<|end|>` (end of a turn).

    Raises:
        ValueError: if a required special token is missing, one is named twice, or the bytes do not fit.
    """
    if len(set(special_tokens)) != len(special_tokens) or not {PAD_TOKEN, END_TOKEN} <= set(special_tokens):
        raise ValueError(f"special_tokens {list(special_tokens)} must be unique and name {PAD_TOKEN} and {END_TOKEN}")
    smallest = NUM_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} does not hold the bytes and special tokens; give >= {smallest}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(special_tokens),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token=END_TOKEN,
        additional_special_tokens=[t for t in special_tokens if t not in (PAD_TOKEN, END_TOKEN)],
        clean_up_tokenization_spaces=False,
    ).save_pretrained(out)
