"""The layering of the package, checked: who may import whom, and where each dependency lives."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "eagle_train"
MODULES = sorted(PACKAGE.rglob("*.py"))
OTHERS = sorted(path for name in ("scripts", "slurm", "tests") for path in (PACKAGE.parent / name).rglob("*.py"))

# A layer may import itself and the layers listed here, nothing else of ours.
MAY_IMPORT = {
    "types": set(),
    "slurm": set(),
    "meeting": set(),
    "dist": {"slurm", "meeting"},
    "resources": set(),
    "data": {"types", "resources"},
    "model": {"types"},
    "track": {"types", "dist"},
    "train": {"types", "dist", "slurm", "resources", "data", "model", "track"},
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


def test_files_of_tests_and_scripts_stay_small_too():
    lengths = {str(path.relative_to(PACKAGE.parent)): path.read_text().count("\n") for path in OTHERS}
    assert len(lengths) > 100 and not {path: length for path, length in lengths.items() if length > 300}


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_rank_variables_are_read_in_dist_and_slurm_only(path):
    homes = {"RANK": "dist.py", "WORLD_SIZE": "dist.py", "SLURM_": "slurm.py"}
    strings = {n.value for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Constant)}
    for name, home in homes.items():
        found = {s for s in strings if isinstance(s, str) and s.startswith(name) and s.isupper()}
        assert not found or path.name == home, f"{path} reads {found}"
