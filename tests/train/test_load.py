"""Configs of models as they are read: those of earlier versions lack keys."""

import yaml

from eagle_train.data.video_frames import PyAvVideo
from eagle_train.train.config import build, load_config
from eagle_train.train.load import parse_config


def test_a_config_from_before_there_were_video_decoders_gets_the_one_of_then(tmp_path):
    config = load_config(["+experiment=toy"])
    older = config | {"data": {name: value for name, value in config["data"].items() if name != "videos"}}
    assert older != config
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(older))
    assert parse_config(path) == config
    assert build(parse_config(path)["data"]["videos"]) == PyAvVideo()


def test_a_video_decoder_that_a_config_names_is_kept(tmp_path):
    target = "eagle_train.data.torchcodec_video.TorchcodecVideo"
    config = load_config(["+experiment=toy", f"data.videos._target_={target}"])
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    assert parse_config(path)["data"]["videos"] == {"_target_": target}
