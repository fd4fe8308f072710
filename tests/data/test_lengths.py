"""Text lengths are those of the encoded conversations, under every template, and made once by all ranks together."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eagle_train.data.answers import AnswerCounter, AnswerEnd
from eagle_train.data.chat import TextRun
from eagle_train.data.index import ensure_index, index_path
from eagle_train.data.lengths import TextLayout, ensure_lengths, lengths_path, read_lengths
from eagle_train.data.shards import write_shards
from eagle_train.data.tables import read_made, read_metadata, read_table
from eagle_train.data.tokenizer.load import load_tokenizer
from eagle_train.train.config import build, load_choice
from eagle_train.types import Message
from tests.vocabularies import TEXT, sentencepiece_bytes, sentencepiece_pieces, write_folder

TEMPLATES = sorted(path.stem for path in (Path(__file__).parents[2] / "configs" / "chat_template").glob("*.yaml"))
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
SPECIAL += ["<|eot_id|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
WORDS = ["Two", "cats", " ", "\n", "été", "picture", "</s>", "12", "日本", "  ", "the", "<image>", "<|im_end|>", "'s"]
WORDS += ["🙂", "e\u0301", "\u0301", "\r\n", "", "ﬁ", "▁", "\u200d", "<|eot_id|>", "\u3000", "<tool>"]


def byte_level(trim: bool):
    """Returns a tokenizer like Qwen's, or with trimmed offsets like others'; some characters are composed."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True)])  # takes the spaces around it
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


@pytest.fixture(scope="module")
def all_tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    llama = write_folder(folder / "llama", sentencepiece_bytes(sentencepiece_pieces()), legacy=False)
    return {
        "llama": load_tokenizer(str(llama), folder / "cache"),
        "bytes": byte_level(trim=False),
        "trimmed": byte_level(trim=True),
    }


def make_template(name):
    return build(load_choice("chat_template", name))


def random_text(rng, longest):
    return "".join(rng.choice(WORDS) + rng.choice((" ", "")) for _ in range(rng.randrange(longest)))


def random_messages(rng):
    """Returns a conversation with images anywhere, a few of them in answers."""
    messages, images = [], 0
    if rng.random() < 0.3:
        messages.append(Message(role="system", content=(random_text(rng, 5),)))
    for _ in range(rng.randrange(1, 5)):
        content = []
        for _ in range(rng.randrange(4)):
            content.append(images if (is_image := rng.random() < 0.4) else random_text(rng, 6))
            images += is_image
        messages.append(Message(role="user", content=tuple(content)))
        answer = (random_text(rng, 8),)
        if rng.random() < 0.15:
            answer, images = (*answer, images, random_text(rng, 4)), images + 1
        messages.append(Message(role="assistant", content=answer))
    return messages


def slow_ends(template, messages, tokenizer):
    """Returns the lengths up to every answer by encoding the messages up to each of them."""
    ends = []
    for count, message in enumerate(messages, 1):
        if message.role == "assistant":
            items = template.encode(messages[:count], tokenizer)
            runs = [run for run in items if isinstance(run, TextRun)]
            tokens, targets = sum(len(run.ids) for run in runs), sum(sum(run.is_target) for run in runs)
            ends.append(AnswerEnd(tokens, targets, len(items) - len(runs)))
    return ends


def laid_out(items):
    """Returns what is encoded as (token, is target) pairs, and None where a medium stands."""
    media = [item for item in items if isinstance(item, int)]
    assert media == [*range(len(media))], "in reading order"
    pairs = []
    for item in items:
        pairs += [None] if isinstance(item, int) else zip(item.ids.tolist(), item.is_target.tolist(), strict=True)
    return pairs


@pytest.mark.slow
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["llama", "bytes", "trimmed"])
def test_lengths_are_those_of_the_encoded_conversations_that_end_there(all_tokenizers, name, template):
    tokenizer, chosen, rng = all_tokenizers[name], make_template(template), random.Random(f"{name} {template}")
    conversations = [random_messages(rng) for _ in range(60)]
    texts = AnswerCounter(chosen, tokenizer).tokenize(conversations)
    found = [text.ends for text in texts]
    assert found == [slow_ends(chosen, messages, tokenizer) for messages in conversations]
    assert sum(map(len, found)) > 100 and sum(end.num_targets > 0 for ends in found for end in ends) > 100
    for text, messages in zip(texts, conversations, strict=True):
        assert laid_out(text.tokens.items()) == laid_out(chosen.encode(messages, tokenizer))


@pytest.mark.parametrize("name", ["llama", "bytes", "trimmed"])
def test_a_run_has_the_tokens_of_a_call_and_targets_are_those_that_touch_learnt_characters(all_tokenizers, name):
    tokenizer, rng = all_tokenizers[name], random.Random(name)
    template = replace(make_template("vicuna_v1"), content_tokens=SPECIAL)  # as a call finds them
    for _ in range(60):
        messages = random_messages(rng)
        items = template.encode(messages, tokenizer)[1:]
        for run, pieces in zip(items, template.render(messages), strict=True):
            if isinstance(run, int):
                continue
            learnt = [is_learnt for text, is_learnt in pieces for _ in text]
            text = "".join(text for text, _ in pieces)
            called = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            touched = [any(learnt[start : max(end, start + 1)]) for start, end in called["offset_mapping"]]
            assert (run.ids.tolist(), run.is_target.tolist()) == (called["input_ids"], touched), text


def test_all_templates_are_tested():
    assert len(TEMPLATES) >= 8 and {"plain", "vicuna_v1", "chatml", "llama3"} <= set(TEMPLATES)


def test_truncation_and_padding_in_a_tokenizer_file_change_nothing(all_tokenizers):
    template, messages = make_template("chatml"), random_messages(random.Random(0))
    tokenizer = byte_level(trim=False)
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=700)
    (found,) = AnswerCounter(template, tokenizer).tokenize([messages])
    assert found.ends == slow_ends(template, messages, all_tokenizers["bytes"])


def test_a_text_that_many_conversations_have_is_tokenized_once(all_tokenizers, monkeypatch):
    batches = []
    counter = AnswerCounter(make_template("vicuna_v1"), all_tokenizers["llama"])

    class Counted:
        def encode_batch_fast(self, texts, **options):
            batches.append(texts)
            return all_tokenizers["llama"].backend_tokenizer.encode_batch_fast(texts, **options)

    monkeypatch.setattr(counter, "_backend", Counted())  # any other call would fail
    one = [Message(role=role, content=(0, "cats")[role == "assistant" :]) for role in ("user", "assistant")]
    other = [*one[:1], Message(role="assistant", content=("dogs",)), *one[:0]]
    found = [text.ends for text in counter.tokenize([one, other, one])]
    assert len(batches) == 1 and len(batches[0]) == 3, "system prompt and question, two different rests"
    assert found[0] == found[2] == slow_ends(make_template("vicuna_v1"), one, all_tokenizers["llama"])


def samples(count, start=0):
    rng = random.Random(start)
    for number in range(start, start + count):
        turns = [
            {"from": role, "value": f"{number} {random_text(rng, 20)}"} for _ in range(3) for role in ("human", "gpt")
        ]
        yield f"{number:04d}", {"conversations": turns}, {}


def layout(tokenizer, fingerprint="t", template="chatml"):
    return TextLayout(template=make_template(template), tokenizer=tokenizer, fingerprint=fingerprint)


@pytest.fixture
def tokenizer(all_tokenizers):
    return all_tokenizers["bytes"]


def lengths(shard, text):
    return read_lengths(read_made(lambda: ensure_lengths(shard, None, text)))


def test_one_pass_and_two_passes_give_the_same(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("eagle_train.data.lengths.BATCH_CHARACTERS", 500)
    (one,) = write_shards(samples(40), tmp_path / "one")
    (two,) = write_shards(samples(40), tmp_path / "two")
    ensure_index(two)
    text = layout(tokenizer)
    scans = []
    scan = "eagle_train.data.index.scan_shard"
    from eagle_train.data.shards import scan_shard

    monkeypatch.setattr(scan, lambda reader: scans.append(1) or scan_shard(reader))
    first = lengths(one, text)
    assert scans == [1] and index_path(one, None).exists()
    assert first == lengths(two, text) and len(first) == 40 and scans == [1]
    assert {len(ends) for ends in first} == {3}


@pytest.mark.slow
def test_a_bad_sample_and_the_rest_of_a_damaged_tar_have_no_lengths(tmp_path, tokenizer):
    bad = ("bad", {"conversations": []}, {})
    (shard,) = write_shards([*samples(2), bad, *samples(3, 5)], tmp_path / "s")
    data = shard.read_bytes()
    shard.write_bytes(data[: data.rindex(b"0007.json") + 100])
    rows = read_table(ensure_index(shard)).to_pylist()
    assert [row["reason"] for row in rows] == [None, None, "no_answer", None, *["missing_shard"] * 2]
    assert [len(ends) for ends in lengths(shard, layout(tokenizer))] == [3, 3, 0, 3, 0, 0]  # 0006 may have lost members


def test_lengths_are_made_again_when_damaged_or_when_the_shard_changed_at_equal_size(tmp_path, tokenizer):
    def record(answer):
        return {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}]}

    text = layout(tokenizer)
    (shard,) = write_shards([("a", record("one two"), {})], tmp_path / "s")
    size, before = shard.stat().st_size, lengths(shard, text)
    path = lengths_path(shard, None, "t")
    assert path.name == "s-000000.text-t.arrow"
    made = path.stat().st_mtime_ns
    assert lengths(shard, text) == before and path.stat().st_mtime_ns == made
    good = path.read_bytes()
    for content in (b"", good[:-9], bytes(len(good))):
        path.write_bytes(content)
        assert lengths(shard, text) == before and path.read_bytes() == good
    write_shards([("a", record("one ṫẅ"[:5]), {})], tmp_path / "s")
    assert shard.stat().st_size == size
    assert lengths(shard, text) != before


def test_the_digest_of_lengths_is_of_their_numbers(tmp_path, tokenizer):
    (shard,) = write_shards(samples(3), tmp_path / "s")

    def digest(*arguments):
        return read_metadata(ensure_lengths(shard, None, layout(tokenizer, *arguments)))[b"digest"]

    assert digest("a") == digest("b") != digest("c", "llama3")


def test_dots_in_names_of_folders_and_shards_are_part_of_them():
    shards = [Path(f"/data/llava-v1.5/part-0.{n}.tar") for n in range(3)]
    for index_dir in (None, Path("/index")):
        paths = {
            path(shard, index_dir) for shard in shards for path in (index_path, lambda *at: lengths_path(*at, "t"))
        }
        assert len(paths) == 6 and all("v1.5" in str(path) for path in paths)
