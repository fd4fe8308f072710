"""A folder's `tokenizer.model` (SentencePiece or tiktoken) as a fast tokenizer that gives the same ids.

The ids are those of the slow tokenizers that the released models were trained with: special tokens are found in the
text first, then every stretch between them is split, with the spaces that `legacy` in the folder's config asks for.

Source: transformers 4.44, `LlamaTokenizer` (slow) and its base class.
"""

from __future__ import annotations

import json
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from eagle_train.data.tokenizer.merges import pair_merges
from eagle_train.data.tokenizer.sentencepiece import SPACE, Kind, SentencePieceModel, read_sentencepiece
from eagle_train.data.tokenizer.tiktoken import LLAMA3_SPLIT, is_tiktoken, read_tiktoken

VOCABULARY = "tokenizer.model"
CONFIG_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
LLAMA3_BEGIN = "<|begin_of_text|>"


def convert(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a folder that holds `tokenizer.model` and its JSON files.

    Raises:
        ValueError: for a vocabulary of another kind than Llama's, or special tokens whose ids do not fit it.
    """
    data = (folder / VOCABULARY).read_bytes()
    config = read_config(folder)
    added = added_tokens(config)
    texts = {token.content for _, token in added}
    if is_tiktoken(data):
        tokenizer = from_tiktoken(read_tiktoken(data), texts)
    else:
        tokenizer = from_sentencepiece(read_sentencepiece(data), config, texts)
    for index, token in added:
        tokenizer.add_tokens([token])
        if index not in (None, found := tokenizer.token_to_id(token.content)):
            raise ValueError(f"{folder}: {token.content!r} has id {index} in the config, {found} in the vocabulary")
    begin = config.get("bos_token")
    if begin is not None and config.get("add_bos_token", True):
        special = [(begin, tokenizer.token_to_id(begin))]
        single, pair = f"{begin} $A", f"{begin} $A {begin}:1 $B:1"
        tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    return tokenizer


def from_sentencepiece(model: SentencePieceModel, config: Mapping[str, Any], added: Container[str]) -> Tokenizer:
    """Returns the tokenizer of a SentencePiece model, before the tokens `added` to it.

    With `legacy` (the default), every stretch of text between special tokens gets the model's own prefix space;
    without, only a text that does not begin with a special token gets one. In both, the space comes on top of those
    that the text begins with.
    """
    vocabulary = {piece.text: index for index, piece in enumerate(model.pieces)}
    (unknown,) = model.texts(Kind.UNKNOWN)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=pair_merges(model.mergeable()),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    legacy = config.get("legacy", True)
    prefixed = model.add_dummy_prefix if legacy else config.get("add_prefix_space", True)
    escape = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), escape]) if legacy and prefixed else escape
    if prefixed and not legacy:
        # Metaspace puts its character before the first stretch unless that begins with it. The spaces of the text
        # are escaped by now, so a plain space always comes, and is escaped in turn.
        first = pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False)
        rest = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([first, rest])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefixed else steps)
    if own := [text for text in model.texts(Kind.USER_DEFINED) if text not in added]:
        if legacy and prefixed:
            raise ValueError(
                f"user-defined pieces {own[:4]} behind a prefix space are not converted; use tokenizer.json"
            )
        tokenizer.add_tokens([AddedToken(text, normalized=True) for text in own])
    return tokenizer


def from_tiktoken(pieces: list[str], added: Container[str]) -> Tokenizer:
    """Returns the tokenizer of a tiktoken vocabulary, before the tokens `added` to it.

    Raises:
        ValueError: unless it is Llama 3's: the file does not say how text is split into words.
    """
    if LLAMA3_BEGIN not in added:
        raise ValueError(f"a tiktoken vocabulary without {LLAMA3_BEGIN} is not Llama 3's; use tokenizer.json")
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    # A word that is a piece is taken whole, as tiktoken does, even where merges would lead elsewhere.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pair_merges(pieces), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the JSON files of a tokenizer folder as one: the tokens of `NAMED` as text or None, tokens by id."""
    config, named, ids = (
        json.loads((folder / name).read_text(encoding="utf-8")) if (folder / name).is_file() else {}
        for name in CONFIG_FILES
    )
    texts = {name: token_text(config.get(name) or named.get(name)) for name in NAMED}
    by_id = {str(index): {"content": text, "special": False} for text, index in ids.items()}
    return config | texts | {"added_tokens_decoder": by_id | config.get("added_tokens_decoder", {})}


def token_text(token: str | Mapping[str, Any] | None) -> str | None:
    """Returns the text of a token as the JSON files write it."""
    return token["content"] if isinstance(token, Mapping) else token


def added_tokens(config: Mapping[str, Any]) -> list[tuple[int | None, AddedToken]]:
    """Returns (id, token) of the tokens that a config lists, by id, then of those that it only names (id None)."""
    by_id = sorted((int(index), token) for index, token in config["added_tokens_decoder"].items())
    listed = {token["content"] for _, token in by_id}
    more = [token_text(token) for token in config.get("additional_special_tokens", [])]
    names = dict.fromkeys(text for text in [*(config[name] for name in NAMED), *more] if text and text not in listed)
    # The slow tokenizers look for them in the text as it is, whatever the config says of `normalized`.
    return [
        *((index, AddedToken(token["content"], **flags(token), normalized=False)) for index, token in by_id),
        *((None, AddedToken(name, normalized=False, special=True)) for name in names),
    ]


def flags(token: Mapping[str, Any]) -> dict[str, bool]:
    """Returns what a config says of an added token, for `AddedToken`."""
    return {
        "lstrip": token.get("lstrip", False),
        "rstrip": token.get("rstrip", False),
        "special": token.get("special", True),
    }
