"""Files of weights are read by name, without what does not belong to them, and written in whole shards."""

import json
import resource
import shutil

import pytest
import torch
from safetensors.torch import save_file

from eagle_train.model.checkpoints.files import read_weights, same, split, stray_files, write_weights
from tests.eagle1_layout import write_headers


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": torch.randn(4, 5, generator=generator),
        "b": torch.randn(7, generator=generator).to(torch.bfloat16),
        "c": torch.tensor(3.5),
        "d": torch.randn(3, 2, generator=generator).T,
        "e": torch.arange(6),
    }


def equal(found, expected):
    return found.keys() == expected.keys() and all(same(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize(("shard_bytes", "files"), [(10_000, 1), (80, 3), (1, 5)])
def test_what_is_written_comes_back_to_the_bit(tmp_path, shard_bytes, files):
    write_weights(tmp_path, tensors(), shard_bytes)
    assert len(list(tmp_path.glob("*.safetensors"))) == files
    assert (tmp_path / "model.safetensors.index.json").exists() == (files > 1)
    assert equal(read_weights(tmp_path), tensors())
    assert stray_files(tmp_path) == []


def test_shards_are_no_larger_than_asked_and_hold_every_tensor_once():
    sizes = {name: t.nbytes for name, t in tensors().items()}
    for limit in (90, 120, 150):
        shards = split(tensors(), limit)
        assert [name for shard in shards for name in shard] == list(sizes)
        assert all(len(shard) == 1 or sum(sizes[name] for name in shard) <= limit for shard in shards)


def test_only_files_that_the_index_names_are_read(tmp_path):
    write_weights(tmp_path, tensors(), shard_bytes=80)
    shard = next(tmp_path.glob("*-00002-of-*.safetensors"))
    save_file({"a": torch.zeros(4, 5), "z": torch.zeros(2)}, tmp_path / f"{shard.stem}_old.safetensors")
    shutil.copy(tmp_path / "model.safetensors.index.json", tmp_path / "model.safetensors.index_old.json")
    assert equal(read_weights(tmp_path), tensors())
    assert stray_files(tmp_path) == [f"{shard.stem}_old.safetensors", "model.safetensors.index_old.json"]


def test_torch_files_are_read_in_shards_and_old_format(tmp_path):
    names = list(tensors())
    for i, part in enumerate((names[:2], names[2:])):
        old = {"_use_new_zipfile_serialization": i == 0}
        torch.save({name: tensors()[name] for name in part}, tmp_path / f"pytorch_model-{i}.bin", **old)
    weight_map = {name: f"pytorch_model-{int(name not in names[:2])}.bin" for name in names}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert equal(read_weights(tmp_path), tensors())


@pytest.mark.parametrize("wrapper", ["ema_state", "module", "model", "state_dict"])
def test_weights_inside_a_training_checkpoint_are_found(tmp_path, wrapper):
    torch.save({wrapper: tensors(), "iteration": 3, "optimizer": {"x": torch.zeros(1)}}, tmp_path / "trained.pth")
    assert equal(read_weights(tmp_path / "trained.pth"), tensors())


def test_safetensors_come_before_torch_files(tmp_path):
    write_weights(tmp_path, tensors())
    torch.save(tensors(seed=1), tmp_path / "pytorch_model.bin")
    assert equal(read_weights(tmp_path), tensors())


def remove_shard(folder):
    next(folder.glob("*-00002-of-*.safetensors")).unlink()


def cut_shard(folder):
    path = next(folder.glob("*-00002-of-*.safetensors"))
    path.write_bytes(path.read_bytes()[:-1])


def name_more(folder):
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["ghost"] = index["weight_map"]["a"]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def remove_all(folder):
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (remove_shard, r"model-00002-of-00003.safetensors is missing"),
        (cut_shard, r"cannot read .*model-00002-of-00003.safetensors"),
        (name_more, r"names tensors that are not there: ghost in model-00001"),
        (remove_all, r"no weights at .*looked for model.safetensors.index.json"),
    ],
)
def test_what_is_missing_is_an_error_that_names_it(tmp_path, damage, said):
    write_weights(tmp_path, tensors(), shard_bytes=80)
    damage(tmp_path)
    with pytest.raises(ValueError, match=said):
        read_weights(tmp_path)


class Code:
    """Something that a file of weights has no business to hold."""


def test_a_torch_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"weights": tensors(), "code": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot read"):
        read_weights(tmp_path)


def test_files_are_mapped_not_read(tmp_path):
    write_headers(tmp_path / "big", {}, {"w": (1 << 16, 1 << 15), "v": (3,)}, num_shards=1)  # 4 GiB, nothing on disk
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    weights = read_weights(tmp_path / "big")
    assert weights["w"].shape == (1 << 16, 1 << 15) and weights["v"].tolist() == [0, 0, 0]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 18  # KiB
