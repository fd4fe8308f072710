"""Loads the tokenizer of a folder or hub id, with exactly the ids that its model was trained with."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from eagle_train.data.tokenizer.convert import CONFIG_FILES, NAMED, VOCABULARY, convert, read_config

FAST = "tokenizer.json"
FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
KEPT = ("chat_template", "model_max_length", "padding_side")
"""What a converted tokenizer keeps of the folder's config, beside its special tokens."""
CONVERSION = b"1"
"""Changes whenever `convert` would make another tokenizer of the same files."""


def load_tokenizer(path: str, cache: Path):
    """Returns the fast tokenizer of a folder or hub id.

    A `tokenizer.json` counts as it is: transformers 5 would rebuild parts of it by the class that the config names. A
    `tokenizer.model` alone (Vicuna, Llama 2) is converted; transformers 5 does not without the SentencePiece library.
    Other folders are left to transformers. No padding token is added where there is none (Llama 3): rows are packed,
    not padded, and nothing finds padding by its id.

    Args:
        path: folder or hub id.
        cache: folder for converted tokenizers.

    Raises:
        OSError: if there is no tokenizer.
        ValueError: if it cannot be converted, or the cache cannot be written.
    """
    folder = tokenizer_folder(path)
    if (folder / FAST).is_file():
        return PreTrainedTokenizerFast.from_pretrained(folder)
    if (folder / VOCABULARY).is_file():
        return PreTrainedTokenizerFast.from_pretrained(converted(folder, cache))
    return AutoTokenizer.from_pretrained(folder)


def tokenizer_folder(path: str) -> Path:
    """Returns the local folder with the tokenizer's files, `FILES`, of a folder or hub id; downloads what is missing.

    Raises:
        FileNotFoundError: if there is none, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    try:
        return Path(snapshot_download(path, allow_patterns=list(FILES)))
    except (OSError, ValueError) as error:  # ValueError: no name that the hub could have
        raise FileNotFoundError(f"neither a folder nor on the hub: {str(error).splitlines()[0]}") from error


def converted(folder: Path, cache: Path) -> Path:
    """Returns the folder in `cache` with the converted tokenizer of `folder`; made unless it is there already.

    It is written aside and published by rename: processes may do so at the same time.

    Raises:
        ValueError: if the vocabulary cannot be converted, or `cache` cannot be written.
    """
    digest = hashlib.sha256(CONVERSION)
    for name in (VOCABULARY, *CONFIG_FILES):
        content = (folder / name).read_bytes() if (folder / name).is_file() else b""
        digest.update(hashlib.sha256(content).digest())
    out = cache / digest.hexdigest()[:32]
    if out.is_dir():
        return out
    config = read_config(folder)
    known = {name: config[name] for name in (*NAMED, *KEPT) if config.get(name) is not None}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=convert(folder), clean_up_tokenization_spaces=False, **known)
    aside = cache / f".{out.name}.{uuid.uuid4().hex[:12]}"
    try:
        tokenizer.save_pretrained(aside)
        aside.rename(out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not out.is_dir():  # it is, where another process was first
            raise ValueError(f"cannot write {out} ({error}); set XDG_CACHE_HOME to a writable folder") from error
    return out


def default_cache() -> Path:
    """Returns the user's cache folder for converted tokenizers, by the XDG convention."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eagle_train" / "tokenizers"
