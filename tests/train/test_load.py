"""Configs of runs and exports, read back."""

import pytest
import yaml

from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.config import build
from eagle_train.train.load import parse_config
from tests.configs import composed


def test_a_config_of_an_earlier_version_is_refused_by_the_keys_that_it_lacks(tmp_path):
    path = tmp_path / "config.yaml"
    config = composed("+experiment=toy")
    path.write_text(yaml.safe_dump(config))
    assert parse_config(path) == config
    path.write_text(yaml.safe_dump({key: config[key] for key in config if key not in ("degrade", "new_tokens")}))
    with pytest.raises(ValueError, match="has no new_tokens, degrade; edit it as the changelog says"):
        parse_config(path)


def test_a_config_from_before_there_was_a_choice_of_video_decoders_gets_the_one_of_then(tmp_path):
    path = tmp_path / "config.yaml"
    config = composed("+experiment=toy")
    older = config | {"data": {name: value for name, value in config["data"].items() if name != "videos"}}
    path.write_text(yaml.safe_dump(older))
    assert older != config == parse_config(path)
    assert build(parse_config(path)["data"]["videos"]) == PyAvVideo()


def test_a_video_decoder_that_a_config_names_is_kept(tmp_path):
    path, target = tmp_path / "config.yaml", "eagle_train.data.torchcodec_video.TorchcodecVideo"
    path.write_text(yaml.safe_dump(composed("+experiment=toy", f"data.videos._target_={target}")))
    assert parse_config(path)["data"]["videos"] == {"_target_": target}
