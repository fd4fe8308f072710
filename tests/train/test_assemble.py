"""What is looked at before anything is trained."""

import shutil

import pytest

from eagle_train.train.assemble import check_evaluation
from tests.configs import composed


def test_an_evaluation_of_sources_that_the_last_recipe_lacks_is_refused(data, tmp_path):
    def check(*overrides, folder=data):
        check_evaluation(composed("+experiment=toy", *overrides), str(folder / "small.yaml"))

    with pytest.raises(ValueError, match="asks for toy_heldout, which recipe small of the last stage does not have"):
        check()
    shutil.copy(data / "small.yaml", tmp_path)  # without the shards, which lie beside the recipe
    with pytest.raises(ValueError, match="source small_all: no shard at "):
        check("evaluation.sources=[small_all]", folder=tmp_path)
    check("evaluation.sources=[small_all]")
    check("evaluation=none")
