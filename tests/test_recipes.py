"""The recipes of published data sets: every fact is there, and the totals are the published ones."""

import pytest

from eagle_train.__main__ import main
from eagle_train.data.recipe import load_recipe, recipe_sources
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
