"""Weights that a new run starts from: those of another model, or each part's own pretrained ones."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError
from rich.table import Table
from torch import nn

from eagle_train.model.checkpoints import internlm2
from eagle_train.model.checkpoints.files import WEIGHT_FILES, listed, read_weights, same
from eagle_train.model.embeddings import TABLES, Vocabulary, fit_rows, tell
from eagle_train.model.vlm import VisionLanguageModel
from eagle_train.train.assemble import build_vocabulary, load_tokenizer
from eagle_train.train.config import ConfigError
from eagle_train.train.load import Put, copy, load_weights, read_config, read_model_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Start:
    """How one part of a model starts."""

    component: str
    source: str | None
    """Hub id, folder or file; None: random weights."""
    loaded: int = 0
    """Tensors."""
    unused: int = 0
    """Tensors of the source that the model has no use for."""
    fresh: tuple[str, ...] = ()
    """Names of the tensors that start from random weights."""
    note: str = ""


def load_run_start(
    config: Mapping[str, Any], model: VisionLanguageModel, tokenizer, *, put: Put = copy, reads: bool = True
) -> list[Start]:
    """Loads the weights that a run's config begins with, see `load_start`.

    Args:
        tokenizer: of the run, with its new tokens.

    Raises:
        ValueError: as `load_start` and `check_tokens`.
    """
    if config["init_from"] is not None:
        check_tokens(config["init_from"], tokenizer)
    return load_start(model, config["init_from"], build_vocabulary(config, tokenizer), put=put, reads=reads)


def check_tokens(init_from: str, tokenizer) -> None:
    """Refuses a tokenizer that gives tokens of a trained model other ids: they would take the rows of others.

    Args:
        init_from: run or export; one whose tokenizer is gone is not compared.
        tokenizer: of the new run.

    Raises:
        ValueError: with the first of these tokens and both ids.
    """
    theirs = read_config(Path(init_from))
    try:
        known = load_tokenizer(theirs["tokenizer"], theirs["new_tokens"]).get_vocab()
    except ConfigError as error:
        log.warning("init_from=%s: its tokens are not compared with the run's: %s", init_from, error)
        return
    ours = tokenizer.get_vocab()
    if moved := sorted((index, token) for token, index in known.items() if ours.get(token, index) != index):
        told = ", ".join(f"{token!r} is {index} there and {ours[token]} here" for index, token in moved[:3])
        raise ValueError(
            f"init_from={init_from} has other ids for {len(moved)} tokens: {told}; "
            f"set tokenizer={theirs['tokenizer']}, and new_tokens in the order {theirs['new_tokens']}"
        )


def load_start(
    model: VisionLanguageModel, init_from: str | None, vocabulary: Vocabulary, *, put: Put = copy, reads: bool = True
) -> list[Start]:
    """Loads the weights a new run starts from; returns what came from where.

    Every rank maps the files into memory; what of them is read, and by whom, `put` decides, tensor by tensor.

    Args:
        model: whole, or under construction.
        put: where a tensor goes, see `load_weights`.
        init_from: run or export whose weights all of it takes; None: every part from its own `pretrained`.
        vocabulary: of the run's tokenizer; the LLM's own pretrained tables are fitted to it.
        reads: see `load_weights`; the pieces of a checkpoint have to be joined, which only those ranks do that must.

    Raises:
        ValueError: if files are missing, or do not hold every tensor that they should.
    """
    if init_from is not None:
        theirs, ours = list(read_config(Path(init_from))["mixture"]["encoders"]), list(model.mixture.encoders)
        if theirs != ours:  # names would fit, but the projector's inputs would be interchanged
            raise ValueError(f"init_from={init_from} has the encoders {theirs}, this model {ours}; order counts")
        weights = read_model_weights(Path(init_from))
        load_weights(model, weights, put=put, reads=reads)
        return [Start(component="all", source=init_from, loaded=len(weights))]
    starts = []
    for name, encoder in model.mixture.encoders.items():
        component = f"mixture.encoders.{name}"
        if encoder.pretrained is None:
            starts.append(random_start(component, encoder))
            continue
        state = read_source(component, encoder.pretrained)
        tensors = encoder.adapt(state)
        starts.append(load_part(component, encoder.pretrained, encoder, state, tensors, encoder.fresh, put=put))
    fusion = [name for name, _ in model.mixture.named_parameters() if not name.startswith("encoders.")]
    if fusion:
        starts.append(Start(component="mixture", source=None, fresh=tuple(fusion)))
    projector = model.projector
    if projector.pretrained is None:
        starts.append(random_start("projector", projector))
    else:
        state = read_source("projector", projector.pretrained)
        starts.append(load_part("projector", projector.pretrained, projector, state, projector.adapt(state), put=put))
    return [*starts, load_llm(model.llm, vocabulary, put=put)]


def random_start(component: str, module: nn.Module) -> Start:
    """Returns the start of a part that keeps its random weights."""
    return Start(component=component, source=None, fresh=tuple(module.state_dict()))


def load_llm(llm: nn.Module, vocabulary: Vocabulary, *, put: Put = copy) -> Start:
    """Loads an LLM's weights, its tables of tokens fitted to the tokenizer, see `fit_rows`.

    Raises:
        ValueError: if they do not fit; also if the LLM ties its head to the embeddings, and the source has another.
    """
    source = llm.config.name_or_path
    if not source:
        return random_start("llm", llm)
    state = read_source("llm", source)
    if internlm2.LANDMARK in state:
        state = internlm2.to_llama(state, llm.config.num_attention_heads, llm.config.num_key_value_heads)
    notes = []
    table, head = TABLES
    tied = llm.config.tie_word_embeddings
    if head not in state and table in state and not tied:
        state = dict(state) | {head: state[table]}
        notes.append(f"{head}: the embeddings, to which the source ties it")
    if tied and {table, head} <= state.keys():
        if not same(state[head], state[table]):
            raise ValueError(
                f"llm: {source} has a {head} of its own, and the config ties it to {table}; "
                f"set llm.tie_word_embeddings=false"
            )
        state = {name: tensor for name, tensor in state.items() if name != head}  # a second copy of the same
    own = llm.state_dict()
    tensors = {name: tensor for name, tensor in state.items() if name in own}
    for name in TABLES:
        if name in tensors:
            table, num_rows = tensors[name], len(own[name])
            tensors[name] = fit_rows(table, num_rows, vocabulary)
            if change := tell(table, num_rows, vocabulary):
                notes.append(f"{name}: {change}")
    return load_part("llm", source, llm, state, tensors, note="; ".join(notes), put=put)


def load_part(
    component: str,
    source: str,
    module: nn.Module,
    state: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    fresh: tuple[str, ...] = (),
    note: str = "",
    *,
    put: Put = copy,
) -> Start:
    """Loads one part and returns its start.

    Args:
        state: what the source holds.
        tensors: what of it the part takes, by the part's names; each is made of one of `state`.
        fresh: prefixes of names that the source does not have.
    """
    try:
        absent = load_weights(module, tensors, fresh, put=put)
    except ValueError as error:
        raise ValueError(f"{component}: {source}: {error}; {remedy(component)}") from error
    return Start(
        component=component,
        source=source,
        loaded=len(tensors),
        unused=len(state) - len(tensors),
        fresh=tuple(name for name in absent if name.startswith(fresh)),
        note=note,
    )


def read_source(component: str, source: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a hub id, `owner/name` or `owner/name/file`, or of a local folder or file.

    Raises:
        ValueError: if it cannot be had, naming the override that helps.
    """
    try:
        path = Path(source).expanduser()
        return read_weights(path if path.exists() else fetch(source))
    except (ValueError, OSError, HfHubHTTPError) as error:
        raise ValueError(
            f"{component}: cannot load {source!r}: {str(error).splitlines()[0]}; {remedy(component)}"
        ) from error


def remedy(component: str) -> str:
    """Returns the overrides that replace a component's source."""
    return f"set {component}.pretrained=FOLDER (local weights) or {component}.pretrained=null (random ones)"


def fetch(source: str) -> Path:
    """Returns the local file of weights, or the index of several, of a hub id; downloads what is not cached.

    Raises:
        ValueError: if the repository has no weights, or nothing is cached and the hub may not be asked.
    """
    owner, _, rest = source.partition("/")
    name, _, file = rest.partition("/")
    if not name or owner in ("", ".", ".."):
        raise ValueError("there is no such file or folder")
    trouble: Exception | None = None
    for candidate in [file] if file else WEIGHT_FILES:
        try:
            path = Path(hf_hub_download(f"{owner}/{name}", candidate))
        except HFValidationError as error:
            raise ValueError("there is no such file or folder, and it is no hub id") from error
        except EntryNotFoundError as error:
            trouble = error
            continue
        if candidate.endswith(".index.json"):
            for shard in sorted(set(json.loads(path.read_text())["weight_map"].values())):
                hf_hub_download(f"{owner}/{name}", shard)
        return path
    raise ValueError(
        f"no local file or folder, and neither the local cache nor the hub gave weights "
        f"(HF_HUB_OFFLINE={constants.HF_HUB_OFFLINE:d}; {type(trouble).__name__})"
    ) from trouble


def start_table(starts: list[Start]) -> Table:
    """Returns what each part starts from, for the terminal."""
    table = Table(title="weights at the start")
    for column in ("part", "source", "loaded", "unused in source", "initialized anew"):
        table.add_column(column, justify="right" if column in ("loaded", "unused in source") else "left")
    for start in starts:
        fresh = listed(start.fresh, 3) if start.source else f"all {len(start.fresh)}"
        anew = "; ".join(text for text in (fresh, start.note) if text)
        table.add_row(start.component, start.source or "random", str(start.loaded), str(start.unused), anew)
    return table
