"""Options of `export` that would do nothing are refused."""

import pytest

from eagle_train.__main__ import main
from tests.configs import untrained


@pytest.fixture(scope="module")
def export(data, tmp_path_factory):
    """An export of the small toy model."""
    return untrained(data, tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--adapter", "--check"], "--layout adapter writes adapters alone"),
        (["--adapter", "--no-check"], "--layout adapter writes adapters alone"),
        (["--layout", "eagle1", "--no-check"], "of an export, --layout eagle1 has no check"),
        (["--layout", "internvl", "--checkpoint", "5"], "--checkpoint is for runs"),
        (["--checkpoint", "5"], "--checkpoint is for runs"),
    ],
)
def test_options_that_would_do_nothing_are_refused(export, tmp_path, capsys, options, said):
    with pytest.raises(SystemExit, match="2"):
        main(["export", str(export), "--out", str(tmp_path / "out"), *options])
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_an_export_is_copied_and_compared(export, tmp_path):
    assert main(["export", str(export), "--out", str(tmp_path / "out"), "--check"]) == 0
    assert (tmp_path / "out/model.safetensors").is_file()
