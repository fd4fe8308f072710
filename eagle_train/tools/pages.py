"""Self-contained HTML pages in the look of the report."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import jinja2


def write_page(out: Path, template: str, /, **values: Any) -> Path:
    """Writes a page; returns its path.

    Args:
        template: file name in this folder; it may include the report's parts, `report.css`.
        values: what the template shows; texts are escaped.
    """
    here, report = resources.files("eagle_train.tools"), resources.files("eagle_train.track")

    def load(part: str) -> str:
        return (report if part.startswith("report") else here).joinpath(part).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(load),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    text = environment.get_template(template).render(**values)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")
    return out
