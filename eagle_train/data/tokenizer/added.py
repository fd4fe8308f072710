"""Special tokens added to a tokenizer, in memory and in the files of a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken

from eagle_train.data.tokenizer.load import FAST, FILES, default_cache, load_tokenizer, tokenizer_folder

CONFIG = "tokenizer_config.json"


def add_special_tokens(tokenizer, texts: Sequence[str]) -> int:
    """Adds special tokens to a fast tokenizer, in order, unless it has them; returns how many it did not have."""
    tokens = [AddedToken(text, special=True, normalized=False) for text in texts]
    return tokenizer.add_tokens(tokens, special_tokens=True)


def num_written(tokenizer, template: str) -> int:
    """Returns how many tokens of a tokenizer, from the first, sequences may hold.

    Special tokens at its end that the template does not name are written by nobody, as their names in samples are
    text: InternVL's `<video>`, for which transformers' processor puts frames.

    Args:
        template: any text that has all special tokens of the chat template, and those that were added for a run.
    """
    count, added = len(tokenizer), tokenizer.added_tokens_decoder
    while (token := added.get(count - 1)) is not None and token.special and token.content not in template:
        count -= 1
    return count


def write_tokenizer(source: str, new_tokens: Sequence[str], out: Path) -> None:
    """Writes the tokenizer of a folder or hub id to `out`: its files as they are, and special tokens that it lacks.

    These stand in `tokenizer.json` and, in the form that transformers 4 and 5 read, in `tokenizer_config.json`.
    """
    folder = tokenizer_folder(source)
    for path in sorted(path for pattern in FILES for path in folder.glob(pattern) if path.is_file()):
        shutil.copy(path, out / path.name)
    if not new_tokens:
        return
    tokenizer = load_tokenizer(source, default_cache())
    if add_special_tokens(tokenizer, new_tokens) == 0:
        return
    tokenizer.backend_tokenizer.save(str(out / FAST))
    config = json.loads((out / CONFIG).read_text()) if (out / CONFIG).is_file() else {}
    config["added_tokens_decoder"] = {
        str(index): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for index, token in sorted(tokenizer.added_tokens_decoder.items())
    }
    special = [*config.get("additional_special_tokens", []), *new_tokens]
    config["additional_special_tokens"] = list(dict.fromkeys(special))
    (out / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
