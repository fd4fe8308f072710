"""Configs of runs and exports, read back."""

import pytest
import yaml

from eagle_train.train.load import MODEL_KEYS, parse_config


def test_a_config_of_an_earlier_version_is_refused_by_the_keys_that_it_lacks(tmp_path):
    path = tmp_path / "config.yaml"
    config = dict.fromkeys(MODEL_KEYS, "any")
    path.write_text(yaml.safe_dump(config))
    assert parse_config(path) == config
    path.write_text(yaml.safe_dump({key: "any" for key in MODEL_KEYS if key not in ("degrade", "new_tokens")}))
    with pytest.raises(ValueError, match="has no new_tokens, degrade; edit it as the changelog says"):
        parse_config(path)
