"""The recipes of published data sets: every fact is there, and the totals are the published ones."""

from fractions import Fraction

import numpy as np
import pytest
import yaml

from eagle_train.__main__ import main
from eagle_train.data.catalog import Source
from eagle_train.data.layout import Summary
from eagle_train.data.mixing import repeats, taken_in
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.split import Selector

PUBLISHED = {  # samples
    "llava-pretrain-558k": 558_128,
    "eagle-sft-1.8m": 1_813_000,
    "cambrian-7m": 7_000_000,
    "cambrian-alignment-2.5m": 2_500_000,
}
EAGLE_SFT = {  # thousands, as Eagle's README lists them
    "llava_665k": 665, "docvqa": 39, "synthdog_en": 50, "chartqa": 28, "dvqa": 25, "ai2d": 15, "sharegpt4v": 100,
    "laion_gpt4v": 11, "lvis_instruct4v": 220, "lrv_instruct": 150, "geo170k": 120, "llavar": 20, "visual7w": 70,
    "openhermes": 300,
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_source_of_a_published_recipe_has_all_its_facts(name):
    recipe = load_recipe(name)
    assert sum(card.num_samples for card in recipe.cards.values()) == PUBLISHED[name]
    for card in recipe.cards.values():
        assert card.licence and card.origin and card.schema and card.description and card.build is None
        assert "://" not in card.origin + recipe.published.download
    assert len({card.shards for card in recipe.cards.values()}) == len(recipe.sources)
    assert recipe.published.annotation in recipe.published.download


def test_the_sft_mix_has_the_fourteen_published_sources():
    recipe = load_recipe("eagle-sft-1.8m")
    counts = {name: card.num_samples for name, card in recipe.cards.items()}
    assert counts.pop("eagle_sft_other") == 0
    assert counts == {f"eagle_sft_{name}": 1000 * count for name, count in EAGLE_SFT.items()}


@pytest.mark.parametrize(
    ("image", "source"),
    [
        ("coco/train2017/000000033471.jpg", "llava_665k"),
        ("gqa/images/2354786.jpg", "llava_665k"),
        ("ocr_vqa/images/140031996.jpg", "llava_665k"),
        ("textvqa/train_images/a.jpg", "llava_665k"),
        ("vg/VG_100K_2/1.jpg", "llava_665k"),
        ("sam/images/sa_1.jpg", "sharegpt4v"),
        ("share_textvqa/images/a.jpg", "sharegpt4v"),
        ("llava/llava_pretrain/images/00000/a.jpg", "sharegpt4v"),
        ("docvqa/images/a.png", "docvqa"),
        ("synthdog-en/images/1.jpg", "synthdog_en"),
        ("chartqa/train/png/a.png", "chartqa"),
        ("dvqa/images/a.png", "dvqa"),
        ("ai2d/images/1.png", "ai2d"),
        ("gpt4v-dataset/images/1.jpg", "laion_gpt4v"),
        ("lvis/train2017/1.jpg", "lvis_instruct4v"),
        ("LRV/1.jpg", "lrv_instruct"),
        ("geo170k/images/1.png", "geo170k"),
        ("llavar/finetune/a.jpg", "llavar"),
        ("visual7w/images/v7w_1.jpg", "visual7w"),
        ("somewhere/else.jpg", "other"),
        (None, "openhermes"),
        ("none", "openhermes"),
    ],
)
def test_the_sft_mix_is_told_apart_by_folders(image, source):
    cards = load_recipe("eagle-sft-1.8m").cards
    selector = Selector({name: card.select for name, card in cards.items()})
    record = {"conversations": []} if image is None else {"image": image}
    assert selector.source_of(record) == f"eagle_sft_{source}"


def test_a_recipe_that_is_not_prepared_says_how(tmp_path):
    with pytest.raises(ValueError, match="data prepare recipe=cambrian-7m from=FOLDER"):
        recipe_sources(load_recipe("cambrian-7m"), tmp_path)


def test_all_recipes_can_be_listed_and_shown(tmp_path, capsys):
    assert main(["data", "list", f"data_root={tmp_path}"]) == 0
    assert "cambrian-7m" in capsys.readouterr().out
    assert main(["data", "show", "recipe=eagle-sft-1.8m", f"data_root={tmp_path}"]) == 0
    shown = capsys.readouterr().out
    assert "shi-labs/Eagle-1.8M" in shown and "CC-BY-NC-4.0" in shown and "*/docvqa*/*" in shown


EAGLE2_SUMS = {  # sources; samples with repeats of stage 1.5 and of stage 2, summed over the paper's Tables B to J
    "general": (34, 2_477_000, 575_000),
    "naive-ocr": (33, 1_522_639, 410_039),
    "counting-grounding": (5, 1_442_000, 48_000),
    "science": (8, 746_313, 399_313),
    "math": (10, 599_778, 289_778),
    "captioning-knowledge": (15, 4_565_100, 174_100),
    "chart-table": (14, 2_054_000, 287_000),
    "ocr-qa": (22, 1_255_630, 549_630),
    "text-only": (16, 3_853_530, 881_530),
}


def samples(recipe, category=""):
    """Returns how many samples an epoch takes of the sources whose shards lie in a category's folder."""
    counts = {
        name: how["repeat"] * recipe.cards[name].num_samples
        for name, how in recipe.sources.items()
        if recipe.cards[name].shards.startswith(f"eagle2/{category}")
    }
    assert all(count == int(count) for count in counts.values())  # repeats are exact
    return sum(counts.values())


@pytest.mark.parametrize("category", EAGLE2_SUMS)
def test_eagle2_takes_the_published_samples_of_each_category(category):
    num_sources, *sums = EAGLE2_SUMS[category]
    first, second = (load_recipe(f"eagle2-stage{stage}") for stage in ("1.5", "2"))
    assert [samples(recipe, f"{category}/") for recipe in (first, second)] == sums
    assert sum(card.shards.startswith(f"eagle2/{category}/") for card in first.cards.values()) == num_sources


def test_eagle2_takes_the_published_157_sources_and_totals():
    first, second = (load_recipe(f"eagle2-stage{stage}") for stage in ("1.5", "2"))
    assert (len(first.sources), len(second.sources)) == (157, 151) and first.sources.keys() >= second.sources.keys()
    assert (samples(first), samples(second)) == (18_515_990, 3_614_390)
    once = {name: min(how["repeat"], 1) * first.cards[name].num_samples for name, how in first.sources.items()}
    assert sum(once.values()) == 18_164_990


REPEATED = {  # by stage 1.5 and stage 2
    "ai2d": (4, 4), "science_qa": (4, 2), "docvqa": (3, 1), "infovqa": (4, 4), "textvqa": (4, 2), "mtvqa": (4, 4)
}  # fmt: skip


def test_eagle2_repeats_the_published_six_sources():
    for place, stage in enumerate(("1.5", "2")):
        sources = load_recipe(f"eagle2-stage{stage}").sources
        expected = {f"eagle2_{name}": counts[place] for name, counts in REPEATED.items() if counts[place] > 1}
        assert {name: how["repeat"] for name, how in sources.items() if how["repeat"] > 1} == expected


@pytest.mark.parametrize(("name", "base"), [("stage1.5", "eagle2-stage1.5"), ("long", "eagle2-stage2")])
def test_eagle2_5_adds_to_eagle2(name, base):
    recipe, base = load_recipe(f"eagle2.5-{name}"), load_recipe(base)
    assert list(recipe.sources.items())[: len(base.sources)] == list(base.sources.items())
    added = recipe.sources.keys() - base.sources.keys()
    assert added >= {f"eagle2_5_{word}" for word in ("pixmo", "viz_wiz", "omni_align_v", "geometry3k")}
    assert all(recipe.cards[source].num_samples is None for source in added)  # the paper gives no counts


def test_a_ratio_takes_exactly_its_samples():
    how = load_recipe("eagle2-stage2").sources["eagle2_llava_150k_en"]
    (passes,) = repeats([Source(name="s", shards=[], **how)], [Summary(num_samples=158_000)], "samples")
    shards = np.cumsum([999] * 158 + [158])  # of 999 samples, and a shorter one
    assert passes == Fraction(57, 158) and taken_in(shards, passes, epoch=0).sum() == 57_000


def test_a_recipe_has_the_sources_of_those_it_includes_before_its_own(tmp_path):
    path = tmp_path / "mine.yaml"
    content = {"name": "mine", "description": "", "include": ["toy-pretrain", "eagle2.5-stage1.5"]}
    path.write_text(yaml.safe_dump(content | {"sources": {"eagle2_ai2d": {"repeat": 9}, "toy_text": {}}}))
    recipe = load_recipe(str(path))
    base = load_recipe("eagle2.5-stage1.5").sources
    assert list(recipe.sources) == ["toy_captions", *base, "toy_text"] == list(recipe.cards)
    assert recipe.sources == {"toy_captions": {"repeat": 1}, **base, "eagle2_ai2d": {"repeat": 9}, "toy_text": {}}
    path.write_text(yaml.safe_dump(content | {"include": ["toyy"], "sources": {}}))
    with pytest.raises(ValueError, match="no recipe toyy; did you mean toy"):
        load_recipe(str(path))


def test_a_recipe_that_includes_itself_is_refused(tmp_path):
    first, second = tmp_path / "first.yaml", tmp_path / "second.yaml"
    for path, other in ((first, second), (second, first)):
        path.write_text(yaml.safe_dump({"name": path.stem, "description": "", "include": [str(other)], "sources": {}}))
    with pytest.raises(ValueError, match=r"includes itself: first.yaml -> second.yaml -> first.yaml"):
        load_recipe(str(first))


def test_sources_of_eagle2_have_shards_of_their_own_and_say_what_is_known():
    recipes = [load_recipe(f"eagle2.5-{name}") for name in ("stage1.5", "long")]
    cards = {name: card for recipe in recipes for name, card in recipe.cards.items()}
    assert len({card.shards for card in cards.values()}) == len(cards) == 168
    for name, card in cards.items():
        assert card.description and card.licence and card.schema and "://" not in card.origin
        assert card.shards.endswith(f"/{name}/*.tar")  # where `data build name=... out=...` puts them
