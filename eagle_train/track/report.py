"""One self-contained HTML file about a run: what it learned, how fast, from which data."""

from __future__ import annotations

import base64
import io
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image, UnidentifiedImageError

from eagle_train.track.charts import short
from eagle_train.track.curves import frames_chart, make_curves
from eagle_train.track.run_folder import RunFolder, read_run
from eagle_train.track.time_bars import time_bars
from eagle_train.track.timeline import goodput_of

LIBRARIES = ("eagle-train", "torch", "transformers", "deepspeed", "wandb")
THUMBNAIL = 256
"""Longest side of an image in the report, in pixels; larger ones are scaled down."""
MAX_IMAGES = 8
"""Images shown of one question; the number of the rest is said."""


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Writes the report of a run, finished or not, and returns its path.

    Args:
        run_dir: folder of the run.
        out: the HTML file; None is `report.html` in `run_dir`.

    Raises:
        ValueError: if `run_dir` is not a run's folder or holds a damaged file.
    """
    run = read_run(run_dir)
    page = template().render(
        run=run,
        facts=facts(run),
        curves=make_curves(run.training) if run.training else None,
        mixture=mixture_rows(run),
        accounting=accounting_rows(run),
        scores=score_rows(run),
        frames=frames_chart(run.scores),
        goodput=time_bars(run.timeline),
        gallery=[gallery_card(run.path / "gallery", entry) for entry in run.gallery],
        versions=versions(),
    )
    out = out or run_dir / "report.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return out


def template() -> jinja2.Template:
    """Returns the page's template; what it includes lies beside it."""
    folder = resources.files("eagle_train.track")
    loader = jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja")


@dataclass(frozen=True, kw_only=True, slots=True)
class Fact:
    """One number of the summary."""

    label: str
    value: str
    note: str = ""


def facts(run: RunFolder) -> list[Fact]:
    """Returns the numbers at the top of the page, those that are known."""
    found = score_facts(run)
    records = run.training
    if not records:
        return found
    losses = [r["train/loss"] for r in records if r.get("stage") == records[-1].get("stage")]
    losses = [loss for loss in losses if loss is not None]
    if losses:
        last = losses[-max(1, min(50, len(losses) // 10)) :]
        note = f"mean of the last {len(last)} records" if len(last) > 1 else "last record"
        found.append(Fact(label="Final loss", value=f"{statistics.fmean(last):.4f}", note=note))
    stages = " → ".join(dict.fromkeys(str(record.get("stage", "")) for record in records))
    found.append(Fact(label="Optimizer steps", value=f"{records[-1]['step']:,}", note=stages))
    if records[-1].get("train/tokens_seen") is not None:
        found.append(Fact(label="Tokens seen", value=short(records[-1]["train/tokens_seen"])))
    timed = [r for r in records if r.get("time/step_seconds") is not None]
    if timed:
        before = [0, *(record["step"] for record in timed[:-1])]
        seconds = sum(r["time/step_seconds"] * (r["step"] - b) for r, b in zip(timed, before, strict=True))
        starts, ranks = len(run.attempts), run.attempts[-1].get("ranks") if run.attempts else None
        parts = [starts and f"{starts} start{'s' * (starts > 1)}", ranks and f"{ranks} rank{'s' * (ranks > 1)}"]
        note = ", ".join(filter(None, parts))
        found.append(Fact(label="Training time", value=str(timedelta(seconds=round(seconds))), note=note))
    speeds = [record.get("time/tokens_per_second") for record in records]
    speeds = [speed for speed in speeds if speed is not None]
    if speeds:
        found.append(Fact(label="Tokens per second", value=f"{statistics.median(speeds):,.0f}", note="median"))
    return found + speed_facts(run)


def speed_facts(run: RunFolder) -> list[Fact]:
    """Returns the run's MFU, if the peak of its devices is known, and its goodput."""
    found = []
    used = [record["perf/mfu"] for record in run.training if record.get("perf/mfu") is not None]
    if used:
        device, peak = run.speed.get("device", "?"), run.speed.get("peak_tflops")
        note = f"median; {device}, peak {peak:g} TFLOP/s" if peak else "median"
        found.append(Fact(label="MFU", value=f"{statistics.median(used):.1%}", note=note))
    if run.timeline.starts:
        seconds = run.timeline.totals()
        note = f"of {timedelta(seconds=round(sum(seconds.values())))} over all starts"
        found.append(Fact(label="Goodput", value=f"{goodput_of(seconds):.1%}", note=note))
    return found


def score_facts(run: RunFolder) -> list[Fact]:
    """Returns the held-out accuracy over the simple question types, if the run was evaluated."""
    simple = next((row for row in score_rows(run) if row.headline), None)
    if simple is None:
        return []
    others = [(simple.grey, "with grey images"), (simple.chance, "by chance")]
    note = ", ".join(f"{value:.0%} {label}" for value, label in others if value is not None)
    return [Fact(label="Held-out accuracy", value=f"{simple.model:.1%}", note=note)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoreRow:
    """Exact match of one question type, each 0 to 1."""

    name: str
    model: float
    grey: float | None
    shuffled: float | None
    """With the frames of videos in another order."""
    chance: float | None
    headline: bool
    """Whether it is the average over the simple types."""


def score_rows(run: RunFolder) -> list[ScoreRow]:
    """Returns the scores by question type, the best first, after their average."""
    scores = run.scores
    prefix = "eval/exact_match/"
    kinds = [name.removeprefix(prefix) for name in scores if name.startswith(prefix)]
    rows = [
        ScoreRow(
            name="simple types, average" if kind == "simple" else kind,
            model=scores[prefix + kind],
            grey=scores.get(f"eval_grey/exact_match/{kind}"),
            shuffled=scores.get(f"eval_shuffled/exact_match/{kind}") if kind != "simple" else None,
            chance=scores.get(f"eval_chance/exact_match/{kind}"),
            headline=kind == "simple",
        )
        for kind in kinds
    ]
    return sorted(rows, key=lambda row: (not row.headline, -row.model, row.name))


@dataclass(frozen=True, kw_only=True, slots=True)
class MixtureRow:
    """Share of one source in a stage, each 0 to 1."""

    stage: str
    source: str
    of: str
    """What it is a share of: samples, tokens or supervised tokens."""
    asked: float
    realized: float


def mixture_rows(run: RunFolder) -> list[MixtureRow]:
    """Returns the shares of all sources of all stages."""
    return [
        MixtureRow(
            stage=stage,
            source=source,
            of=str(shares.get("of", "samples")).replace("_", " "),
            asked=shares["asked"],
            realized=shares["realized"],
        )
        for stage, sources in run.mixture.items()
        for source, shares in sources.items()
    ]


SUMS = ("tokens", "targets", "tiles", "frames")
"""Counts of an `AccountRow` that tell what its used samples gave."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountRow:
    """Where the samples of one source went in a stage."""

    stage: str
    source: str
    read: int
    used: int
    dropped: dict[str, int]
    """By reason."""
    shortened: dict[str, int] = field(default_factory=dict)
    """`samples` cut to whole turns that fit a row, and the `turns` and `tokens` this cost; none in older books."""

    tokens: int = 0
    """Of the used samples, as are the next three; 0 in older books."""
    targets: int = 0
    """Tokens with loss."""
    tiles: int = 0
    frames: int = 0
    """Of videos."""

    @property
    def gave(self) -> str:
        """What the used samples gave, in words."""
        parts = {"tokens": self.tokens, "with loss": self.targets, "tiles": self.tiles, "frames": self.frames}
        return ", ".join(f"{count:,} {name}" for name, count in parts.items() if count)

    @property
    def unexplained(self) -> int:
        """Samples read that are neither used nor dropped; 0 if the books are right."""
        return self.read - self.used - sum(self.dropped.values())


def accounting_rows(run: RunFolder) -> list[AccountRow]:
    """Returns the accounts of all sources, and of each stage with several sources their sum."""
    rows = []
    for stage, sources in run.accounting.items():
        own = [AccountRow(stage=stage, source=source, **account) for source, account in sources.items()]
        rows += own
        if len(own) > 1:
            reasons = dict.fromkeys(reason for row in own for reason in row.dropped)
            rows.append(
                AccountRow(
                    stage=stage,
                    source="",
                    read=sum(row.read for row in own),
                    used=sum(row.used for row in own),
                    dropped={reason: sum(row.dropped.get(reason, 0) for row in own) for reason in reasons},
                    shortened={name: sum(row.shortened.get(name, 0) for row in own) for name in own[0].shortened},
                    **{name: sum(getattr(row, name) for row in own) for name in SUMS},
                )
            )
    return rows


def gallery_card(folder: Path, entry: dict[str, Any]) -> dict[str, Any]:
    """Returns a gallery entry with its first images inlined as data URIs (None where one is unreadable)."""
    names: Sequence[str] = entry["images"]
    return entry | {
        "images": [data_uri(folder / name) for name in names[:MAX_IMAGES]],
        "num_more": max(0, len(names) - MAX_IMAGES),
    }


def data_uri(path: Path) -> str | None:
    """Returns an image file as a data URI, at most THUMBNAIL pixels large; None if it cannot be read."""
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            if image.format != "PNG" or max(image.size) > THUMBNAIL:
                small = image.convert("RGB")
                small.thumbnail((THUMBNAIL, THUMBNAIL))
                buffer = io.BytesIO()
                small.save(buffer, "PNG", optimize=True)
                data = buffer.getvalue()
    except (OSError, UnidentifiedImageError):
        return None
    return "data:image/png;base64," + base64.b64encode(data).decode("ascii")


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the libraries that are installed here."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
