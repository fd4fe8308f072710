"""Metrics to Weights & Biases: online for a user who is logged in, else to files that `wandb sync` uploads later.

The only file that imports wandb, and only when a tracker is made: the import takes most of a second.
"""

from __future__ import annotations

import logging
import netrc
import os
import secrets
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from eagle_train.track.jsonl import read_metrics
from eagle_train.track.tracker import Metrics

log = logging.getLogger(__name__)

STEP = "global_step"
MODES = ("online", "offline", "disabled")
SENT_AGAIN = 200
"""Points before a resume that are sent once more, at least; of a step that W&B knows, it keeps the first."""
MISSED = "missed-since"
"""File beside W&B's own, with the first step that it was not told of."""
FINISH_SECONDS = 45.0
"""That W&B has to upload what is left. By itself it would wait for ever, and a job that is preempted, whose
`preemption.margin_seconds` are 60, would be killed before it could ask to be run again."""
FLUSH_SECONDS = 0.5
"""Of W&B's local file. Measured with wandb 0.31: with its default of 15 s, a run killed after 3 s left none of its
points on disk; with 0.5 s, 74 of 79."""


def new_run_id() -> str:
    """Returns a random id for a new run: 8 lower-case letters and digits, as W&B makes them.

    Not drawn from `random`, so that seeding a run does not give two runs the same id.
    """
    return "".join(secrets.choice(string.ascii_lowercase + string.digits) for _ in range(8))


class WandbTracker:
    """One W&B run with its own step axis.

    A resumed run goes on under its id. W&B keeps the first values of steps that are done again after a resume.
    Its own process dies of a SIGTERM to the whole job: then it misses the last points, which the next start sends.
    Offline it makes a new folder per start; `wandb sync` joins them by their id. A start that is to be online and
    cannot reach W&B is offline instead.

    Args:
        run_dir: folder of the run; W&B's files go to `wandb/` in it.
        project, name: under which W&B shows the run.
        run_id: see `new_run_id`; the same on every start of the run.
        config: the run's config, shown with it.
        mode: `online`, `offline` or `disabled`; None takes WANDB_MODE, else online if logged in, else offline.

    Raises:
        ValueError: for an unknown mode.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        project: str,
        name: str,
        run_id: str,
        config: Mapping[str, Any],
        mode: str | None = None,
    ) -> None:
        mode = choose_mode(mode, os.environ)
        import wandb

        run_dir.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            console="off",  # the terminal is the console tracker's
            silent=True,
            disable_code=True,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
            finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )
        begin = partial(
            wandb.init,
            project=project,
            name=name,
            id=run_id,
            resume="allow",
            dir=run_dir,
            config=dict(config),
            settings=settings,
        )
        try:
            self._run = begin(mode=mode)
        except wandb.errors.CommError as error:
            if mode != "online":
                raise
            log.warning("W&B cannot be reached (%s): this start is offline, `wandb sync` uploads it", error)
            wandb.teardown()  # its process holds the id of the run that did not begin
            self._run = begin(mode="offline")
        # W&B's own counter is of no use as an axis: each offline start would begin at 0 again.
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP)
        self._lost = False
        self._missed = run_dir / "wandb" / MISSED
        self._send_again(run_dir / "metrics.jsonl")

    def begin_stage(self, stage: str, step: int, num_steps: int) -> None:
        """Writes nothing: every record of a stage names it."""

    def log(self, metrics: Metrics, step: int) -> None:
        """Records the metrics with `global_step` as their x axis; records of the same step become one.

        Scores are the run's summary too: W&B passes over those of a step that it had before a resume.
        """
        self._try(lambda: self._run.log(dict(metrics) | {STEP: step}, step=step), step)
        scores = {name: value for name, value in metrics.items() if name.startswith("eval")}
        if scores:
            self._try(lambda: self._run.summary.update(scores), step)

    def close(self, *, failed: bool = False) -> None:
        """Writes or uploads what is left; W&B shows the run as failed or as finished."""
        self._try(partial(self._run.finish, exit_code=int(failed)))
        if not self._lost:
            self._missed.unlink(missing_ok=True)

    def _send_again(self, metrics: Path) -> None:
        """Sends the last points before a resume, since those that were under way at the end may be lost."""
        since = [int(self._missed.read_text() or 0)] if self._missed.exists() else []
        since += [self._run.starting_step] if self._run.starting_step else []  # what W&B's server lacks
        records = read_metrics(metrics) if metrics.exists() else []
        for record in points_to_send(records, min(since, default=None)):
            values = {name: value for name, value in record.items() if name not in ("step", "time")}
            self.log({name: value for name, value in values.items() if value is not None}, record["step"])

    def _try(self, act: Callable[[], Any], step: int | None = None) -> None:
        """Does something unless W&B's process is gone, which is no reason to end a run: metrics.jsonl has it all.

        Args:
            step: that W&B is told of; the next start sends all from the first that it missed.
        """
        if self._lost:
            return
        try:
            act()
        except Exception as error:
            self._lost = True
            log.warning("W&B is gone (%r); the next start sends what it missed", error)
            if step is not None and not self._missed.exists():
                with suppress(OSError):  # a full disk: the next start sends the last points
                    self._missed.write_text(str(step))


def points_to_send(records: Sequence[dict[str, Any]], since: int | None) -> Sequence[dict[str, Any]]:
    """Returns the last records of a run: `SENT_AGAIN` of them, and those that W&B missed.

    Args:
        since: first step that it was not told of; None: it was told of all.
    """
    told = len(records) if since is None else sum(record["step"] < since for record in records)
    return records[max(0, told - SENT_AGAIN) :]


def choose_mode(mode: str | None, env: Mapping[str, str]) -> str:
    """Returns the W&B mode: `mode`, else WANDB_MODE, else online if the user is logged in, else offline.

    Raises:
        ValueError: for an unknown mode.
    """
    chosen = mode or env.get("WANDB_MODE") or ("online" if logged_in(env) else "offline")
    if chosen not in MODES:
        raise ValueError(f"W&B mode {chosen!r} is none of {', '.join(MODES)}; check tracker.wandb.mode and WANDB_MODE")
    return chosen


def logged_in(env: Mapping[str, str]) -> bool:
    """Whether there is an API key: in WANDB_API_KEY, or in the netrc file for the host of WANDB_BASE_URL."""
    if env.get("WANDB_API_KEY"):
        return True
    path = Path(env.get("NETRC") or Path(env.get("HOME", "")) / ".netrc")
    host = urlparse(env.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    if host is None:
        return False
    try:
        # `authenticators` would also give the entry of another host named `default`.
        return host in netrc.netrc(path).hosts
    except (OSError, netrc.NetrcParseError):
        return False
