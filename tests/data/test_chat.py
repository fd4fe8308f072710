"""The label mask covers exactly the answers and their end tokens, for every template."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from eagle_train.data.chat import TextRun, encode_run
from eagle_train.train.config import build, load_choice, options
from eagle_train.types import Message

ANSWERS = ("  Two cats, I think.", "No — 12 été\nof them", "7")
TEXTS = ["what is in the picture? a cat, two dogs: 12 été 日本", *ANSWERS]


ASCII = "".join(chr(c) + " " for c in range(32, 127)) + "\n"


def make_tokenizer(pre_tokenizer, decoder, special):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet() if isinstance(decoder, decoders.ByteLevel) else []
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<pad>", *special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*TEXTS * 3, ASCII], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=special[-1])


def special_tokens(template):
    pieces = [template.start or "", *template.prefix.values(), *template.suffix.values()]
    found = []
    for piece in pieces:
        while "<" in piece and ">" in piece:
            token = piece[piece.index("<") : piece.index(">") + 1]
            found.append(token)
            piece = piece.replace(token, "")
    return sorted(set(found)) or ["</s>"]


def byte_level(template):
    """GPT-2 style, as Llama 3 and Qwen."""
    return make_tokenizer(
        pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel(), special_tokens(template)
    )


def metaspace(template):
    """SentencePiece style, as Vicuna: a word's first token holds the space before it."""
    return make_tokenizer(
        pre_tokenizers.Metaspace(prepend_scheme="first"), decoders.Metaspace(), special_tokens(template)
    )


def template_of(name):
    return build(load_choice("chat_template", name))


CONVERSATION = (
    Message(role="user", content=(0, "what is in the picture?")),
    Message(role="assistant", content=(ANSWERS[0],)),
    Message(role="user", content=("a cat,", 1, "two dogs:")),
    Message(role="assistant", content=(ANSWERS[1],)),
    Message(role="user", content=("12",)),
    Message(role="assistant", content=(ANSWERS[2],)),
)


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("name", options("chat_template"))
def test_mask_covers_exactly_answers_and_end_tokens(name, make):
    template = template_of(name)
    tokenizer = make(template)
    items = template.encode(CONVERSATION, tokenizer)
    assert [item for item in items if isinstance(item, int)] == [0, 1]
    learnt, covered = [], []
    for item, run in zip(items[1:], template.render(CONVERSATION), strict=True):
        if isinstance(item, int):
            continue
        text = "".join(piece for piece, _ in run)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert item.ids.tolist() == encoded["input_ids"], "tokenized as one string"
        wanted = [i for i, is_learnt in spread(run) if is_learnt]
        got = {i for (a, b), t in zip(encoded["offset_mapping"], item.is_target, strict=True) if t for i in range(a, b)}
        missing = [i for i in wanted if i not in got and not text[i].isspace()]
        extra = [i for i in got if i not in wanted]
        assert not missing and not extra, (text, missing, extra)
        learnt += wanted
        covered += got
    around = len(template.answer_prefix + template.suffix["assistant"])
    assert len(learnt) == sum(len(answer.strip() if template.strip else answer) + around for answer in ANSWERS)
    assert covered


def spread(run):
    place = 0
    for piece, is_learnt in run:
        for _ in piece:
            yield place, is_learnt
            place += 1


@pytest.mark.parametrize("name", options("chat_template"))
def test_last_supervised_token_of_each_answer_is_its_end_token(name):
    template = template_of(name)
    tokenizer = byte_level(template)
    end = tokenizer.encode(template.suffix["assistant"], add_special_tokens=False)[-1]
    ids, targets = [], []
    for item in template.encode(CONVERSATION, tokenizer):
        if isinstance(item, TextRun):
            ids += item.ids.tolist()
            targets += item.is_target.tolist()
    last = [i for i, t in enumerate(targets) if t and not ([*targets, False])[i + 1]]
    if name != "plain":  # whose answers follow one another without anything between
        assert len(last) == len(ANSWERS)
    assert all(ids[i] == end for i in last)


@pytest.mark.parametrize("name", sorted(set(options("chat_template")) - {"plain"}))
def test_prompt_is_a_prefix_of_the_training_text(name):
    template = template_of(name)
    prompt = render_text(template.render(CONVERSATION[:1]), template.prefix["assistant"])
    full = render_text(template.render(CONVERSATION[:2]), "")
    assert full.startswith(prompt)
    answer = ANSWERS[0].strip() if template.strip else ANSWERS[0]
    assert full[len(prompt) :].startswith(template.answer_prefix + answer)


def render_text(items, more):
    return "".join("<media>" if isinstance(i, int) else "".join(text for text, _ in i) for i in items) + more


def test_a_masked_template_has_the_same_text_and_learns_no_newline_behind_an_answer():
    def rendered(name):
        runs = [item for item in template_of(name).render(CONVERSATION) if not isinstance(item, int)]
        pieces = [piece for run in runs for piece in run]
        return "".join(text for text, _ in pieces), "".join(text for text, is_learnt in pieces if is_learnt)

    (text, learnt), (masked_text, masked) = rendered("qwen2_vl"), rendered("qwen2_vl_masked")
    assert masked_text == text
    assert learnt == masked.replace("<|im_end|>", "<|im_end|>\n") and masked.count("<|im_end|>") == len(ANSWERS)


def test_plain_drops_questions_but_keeps_media():
    template = template_of("plain")
    items = template.render(CONVERSATION[:2])
    assert render_text(items, "") == f"<media>{ANSWERS[0]}\n"


def test_system_prompt_is_put_first_unless_the_sample_brings_one():
    template = template_of("vicuna_v1")
    assert template.system in render_text(template.render(CONVERSATION), "")
    own = (Message(role="system", content=("Be brief.",)), *CONVERSATION)
    text = render_text(template.render(own), "")
    assert "Be brief." in text and template.system not in text


def test_stop_ids_hold_the_end_token():
    template = template_of("toy")
    tokenizer = byte_level(template)
    assert tokenizer.convert_tokens_to_ids("<|end|>") in template.stop_ids(tokenizer)


def test_an_empty_run_gives_nothing():
    run = encode_run([("", False), ("", True)], byte_level(template_of("toy")).backend_tokenizer)
    assert len(run.ids) == len(run.is_target) == 0


@pytest.mark.parametrize("name", ["chatml", "llama3", "yi_chatml", "phi3_chat", "eagle2"])
def test_a_tokenizer_without_the_tokens_around_turns_is_noticed(name):
    template = template_of(name)
    turns = special_tokens(template)
    bare = make_tokenizer(pre_tokenizers.ByteLevel(), decoders.ByteLevel(), ["<end>"])
    assert turns and set(turns) <= set(template.missing_tokens(bare))
    assert not set(turns) & set(template.missing_tokens(byte_level(template)))
