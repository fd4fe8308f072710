"""Which options of a command line were given."""

from __future__ import annotations

import argparse
from collections.abc import Iterable


def given(parser: argparse.ArgumentParser, options: argparse.Namespace, names: Iterable[str]) -> list[str]:
    """Returns those of `names`, as `--name`, whose value is not the parser's default."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) != parser.get_default(name)]
