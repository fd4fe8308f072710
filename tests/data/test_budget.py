"""The budget of bad samples: per source, each with its own share, as its recipe says."""

import pytest
import yaml

from eagle_train.__main__ import main
from eagle_train.data.budget import BadSampleBudget, TooManyBadSamples
from eagle_train.data.build_layouts import ensure_layouts
from eagle_train.data.catalog import Source
from eagle_train.data.open_catalog import open_catalog
from eagle_train.data.recipe import load_recipe
from eagle_train.data.recipe_sources import recipe_sources
from eagle_train.data.shards import write_shards
from eagle_train.data.too_long import DropTooLong
from eagle_train.train.stage_data import make_layout
from eagle_train.types import SampleError
from tests.data.loads import tiny_encoder
from tests.data.test_bad_samples import BAD, GOOD


def error(i, source="a"):
    return source, SampleError(f"{source}/x/{i}", "unreadable_image", "broken")


def recipe(folder, sources):
    card = {"description": "", "licence": "", "origin": "", "shards": "a/*.tar"}
    content = {"name": "r", "description": "", "sources": sources, "datasets": dict.fromkeys(sources, card)}
    (folder / "r.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return str(folder / "r.yaml")


def test_every_source_has_its_own_share():
    budget = BadSampleBudget({"a": 100, "b": 100}, {"a": 0.02, "b": 0.0}, [error(0), error(1), error(1)])
    budget.check()
    budget.add([error(0)])
    budget.check()  # the same sample again
    budget.add([error(2)])
    with pytest.raises(TooManyBadSamples, match=r"source a: 3 of 100 .*max_bad_share=0\.02") as caught:
        budget.check()
    assert [each.key for each in caught.value.errors] == ["a/x/0", "a/x/1", "a/x/2"]
    strict = BadSampleBudget({"a": 100, "b": 100}, {"a": 1.0, "b": 0.0}, [error(0), error(0, "b")])
    with pytest.raises(TooManyBadSamples, match=r"source b: 1 of 100 .*max_bad_share=0"):
        strict.check()


def test_a_source_without_a_share_has_that_of_the_run(tmp_path):
    write_shards(GOOD[:2], tmp_path / "a")
    path = recipe(tmp_path, {"own": {"repeat": 2.0, "max_bad_share": 0.05}, "zero": {"max_bad_share": 0}, "plain": {}})
    own, zero, plain = recipe_sources(load_recipe(path), tmp_path)
    assert [source.bad_share(0.01) for source in (own, zero, plain)] == [0.05, 0, 0.01]
    assert own.repeat == 2.0 and plain.repeat == 1.0
    assert Source(name="s", shards=[]).bad_share(0.3) == 0.3


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"repaet": 1.0}, "source s has an unknown key 'repaet'; did you mean repeat"),
        ({"max_bad": 0.1}, "unknown key 'max_bad'; did you mean max_bad_share"),
        ({"repeat": -1}, "source s has repeat=-1; it is a number, 0 or more"),
        ({"repeat": "twice"}, "repeat='twice'; it is a number"),
        ({"repeat": "1/0"}, "repeat='1/0'; it is a number, 0 or more, or a ratio such as 57/158"),
        ({"repeat": None}, "repeat=None; it is a number"),
        ({"repeat": float("nan")}, "repeat=nan"),
        ({"repeat": float("inf")}, "repeat=inf"),
        ({"repeat": 1, "weight": 2}, "has a repeat and a weight; give one of them"),
        ({"weight": -2}, "source s has weight=-2; it is a number, 0 or more"),
        ({"max_bad_share": 5}, "max_bad_share=5; it is a share, from 0 to 1"),
        (None, r"source s is None; write s: \{repeat: 1.0\}"),
        (1.5, "source s is 1.5; write"),
    ],
)
def test_what_a_recipe_may_not_say_about_a_source_is_refused(how, said, tmp_path):
    with pytest.raises(ValueError, match=rf"r\.yaml: .*{said}"):
        load_recipe(recipe(tmp_path, {"s": how}))


def test_a_recipe_may_weigh_its_sources(tmp_path, capsys):
    write_shards(GOOD[:2], tmp_path / "a")
    path = recipe(tmp_path, {"three": {"weight": 3}, "half": {"weight": 0.5}})
    assert [source.weight for source in recipe_sources(load_recipe(path), tmp_path)] == [3, 0.5]
    assert main(["data", "show", f"recipe={path}"]) == 0
    assert "three (weight 3):" in capsys.readouterr().out


def test_no_share_of_its_own_may_be_written_out(tmp_path):
    assert load_recipe(recipe(tmp_path, {"s": {"max_bad_share": None}})).sources == {"s": {"max_bad_share": None}}


def test_too_long_samples_are_not_bad_but_have_a_limit_of_their_own(data, tmp_path):
    layout = make_layout(tiny_encoder(data), 256, DropTooLong())
    shards = write_shards([*GOOD[:8], BAD["too_long"], BAD["no_answer"]], tmp_path / "s")
    ensure_layouts([(shard, None, "s", None) for shard in shards], layout)

    def found(**limits):
        return open_catalog([Source(name="s", shards=shards)], layout.fingerprint, **limits)

    assert found(max_bad_share=0.1).dropped() == {"s": {"no_answer": 1, "too_long": 1}}
    with pytest.raises(TooManyBadSamples, match=r"1 of 10 samples are bad \(1 no_answer\)"):
        found(max_bad_share=0.09)
    assert found(max_bad_share=0.1, max_too_long_share=0.1)
    with pytest.raises(ValueError, match=r"source s: 1 of 10 samples are longer .*max_too_long_share=0.09; raise"):
        found(max_bad_share=0.1, max_too_long_share=0.09)
    budget = BadSampleBudget({"s": 10}, {"s": 0.1}, [("s", error) for _, error in found(max_bad_share=1).errors()])
    budget.check()
    assert [error.reason for error in budget.bad["s"].values()] == ["no_answer"]
