"""The layering of the package, checked: who may import whom, and where each dependency lives."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "eagle_train"
MODULES = sorted(PACKAGE.rglob("*.py"))

# A layer may import itself and the layers listed here, nothing else of ours.
MAY_IMPORT = {
    "types": set(),
    "dist": set(),
    "resources": set(),
    "data": {"types", "resources"},
    "model": {"types"},
    "track": {"types", "dist"},
    "train": {"types", "dist", "resources", "data", "model", "track"},
}
# Heavy or replaceable dependencies, each with the only module, or package (ending in a slash), that may import it.
HOME_OF = {
    "deepspeed": "train/zero/",
    "wandb": "track/wandb_tracker.py",
    "webdataset": "data/shards.py",
    "hydra": "train/config.py",
    "omegaconf": "train/config.py",
    "av": "data/videos.py",
    "fsspec": "data/storage.py",
    "simplejpeg": "data/turbo_jpeg.py",
    "flash_attn": "model/attention/flash.py",
    "flash_attn_interface": "model/attention/flash.py",
    "liger_kernel": "model/loss.py",
    "peft": "model/lora.py",
    "torchcodec": "data/torchcodec_video.py",
}
EXTRA_HOMES = {"av": {"data/video_frames.py", "data/toy/video.py"}}  # videos.py opens them, these decode and encode


def imports(path):
    """Yields the dotted name of every module imported anywhere in `path`."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_there_are_modules_to_check():
    assert len(MODULES) > 40
    assert {name.split("/")[0] for name in HOME_OF.values()} <= {p.name for p in PACKAGE.iterdir()}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_layers(path):
    where = str(path.relative_to(PACKAGE))
    layer = where.split("/")[0].removesuffix(".py")
    for name in imports(path):
        root, *rest = name.split(".")
        if root == "eagle_train" and layer in MAY_IMPORT:
            allowed = MAY_IMPORT[layer] | {layer}
            assert rest[0] in allowed, f"{where} may not import {name}"
        homes = {HOME_OF.get(root, where)} | EXTRA_HOMES.get(root, set())
        assert any(where == home or (home.endswith("/") and where.startswith(home)) for home in homes), (
            f"{root} belongs in {homes}"
        )


@pytest.mark.parametrize("name", sorted(HOME_OF))
def test_every_home_is_lived_in(name):
    home = PACKAGE / HOME_OF[name]
    modules = home.glob("*.py") if home.is_dir() else [home]
    assert any(found.split(".")[0] == name for module in modules for found in imports(module))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path):
    source = path.read_text()
    assert source.count("\n") <= 300, "split the file"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rank_variables_are_read_in_dist_only(path):
    names = ("RANK", "WORLD_SIZE", "SLURM_")
    strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    found = {s for s in strings if isinstance(s, str) and s.startswith(names) and s.isupper()}
    assert not found or path.name == "dist.py", f"{path} reads {found}"
