"""The live view of a run: a bar and a compact table at a terminal, one line per N steps elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from advgame.run import names

LINE_EVERY_SECONDS = 30.0
"""Without a terminal a line also appears when this long has passed since the last one."""


class _Screen:
    """A rich Live, or nothing where there is no terminal; `stop` always restores the terminal."""

    def __init__(self, enabled: bool, console: Console | None) -> None:
        self.console = console or Console(file=sys.stdout)
        self.enabled = enabled
        self.drawn = enabled and self.console.is_terminal
        # `transient` is off: the last state stays readable above the shell prompt.
        self._live = Live(console=self.console, refresh_per_second=2) if self.drawn else None

    def start(self) -> None:
        if self._live is not None:
            self._live.start()

    def stop(self) -> None:
        if self._live is not None:
            try:
                self._live.stop()
            finally:
                self.console.show_cursor(True)  # a stop cut short by a second Ctrl-C leaves it hidden

    def draw(self, content: Group) -> None:
        if self._live is not None:
            self._live.update(content)

    def print(self, text: str) -> None:
        if self.enabled:
            # rich lifts it above a live display; no markup, since attacks and paths contain brackets.
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """Shows the steps of a game. Use as a context manager.

    `enabled` off prints nothing. With a terminal: bar and table; without (CI logs, nohup): one line per
    `every` steps, at the last step, and at least every 30 s. Lines also go to `log` (the run folder's
    log.txt), always.
    """

    def __init__(
        self,
        total_steps: int,
        enabled: bool,
        *,
        first_step: int = 0,
        every: int = 10,
        log: Path | None = None,
        console: Console | None = None,
    ) -> None:
        """`first_step`: steps that a resumed run had finished; the ETA does not count them as done now."""
        self.total_steps = total_steps
        self.every = max(1, every)
        self.log = log
        self._screen = _Screen(enabled, console)
        self._bar = _progress(self._screen.console)
        self._task = self._bar.add_task("steps", total=total_steps, completed=first_step, extra="")
        self._done = first_step
        self._first = first_step
        self._known: dict[str, float] = {}
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> LiveView:
        self._screen.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.stop()

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """After step `step` (counted from 0): its metrics, under the names of `names.py`.

        What comes rarely (`eval/...`) stays on view until it is measured again; all else is this step's or
        absent.
        """
        lasting = {k: v for k, v in self._known.items() if k.startswith((names.EVAL_PREFIX, names.COUNTER_PREFIX))}
        self._known = {**lasting, **values}
        self._done = step + 1
        self._bar.update(self._task, completed=self._done)
        if self._screen.drawn:
            self._screen.draw(Group(_table(step, self._known), self._bar))
        now = time.monotonic()
        due = self._done % self.every == 0 or self._done >= self.total_steps
        if due or now - self._last_line > LINE_EVERY_SECONDS:
            self._last_line = now
            line = self._line(now)
            self.to_log(line)
            if not self._screen.drawn:
                self._screen.print(line)

    def note(self, text: str) -> None:
        """Prints one message above the view and into the log (a checkpoint written, a warning)."""
        self.to_log(text)
        self._screen.print(text)

    def _line(self, now: float) -> str:
        pace = (now - self._started) / max(self._done - self._first, 1)
        eta = _clock(pace * max(self.total_steps - self._done, 0))
        cells = [f"{label} {value}" for label, value in _cells(self._known)]
        return "  ".join([f"step {self._done}/{self.total_steps}", f"eta {eta}", *cells])

    def to_log(self, text: str) -> None:
        """One line into the log alone, with the time."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {text}\n")


class Stage:
    """Bars for a stage with several parallel parts, such as the warm start of both players.

    `parts` maps a part's name to its number of steps. Without a terminal: a line at each quarter of a part.
    """

    def __init__(self, title: str, parts: Mapping[str, int], enabled: bool, *, console: Console | None = None) -> None:
        self.title = title
        self._screen = _Screen(enabled, console)
        self._bars = _progress(self._screen.console)
        self._tasks = {
            name: self._bars.add_task(f"{title}: {name}", total=total, extra="") for name, total in parts.items()
        }
        self._totals = dict(parts)
        self._quarters = dict.fromkeys(parts, 0)

    def __enter__(self) -> Stage:
        self._screen.start()
        self._screen.draw(Group(self._bars))
        return self

    def __exit__(self, *_: object) -> None:
        self._screen.stop()

    def update(self, part: str, done: int, **values: float) -> None:
        """`done` steps of `part` are finished; `values` (a loss, say) are shown beside its bar."""
        extra = "  ".join(f"{key} {value:.3g}" for key, value in values.items())
        self._bars.update(self._tasks[part], completed=done, extra=extra)
        quarter = 4 * done // max(self._totals[part], 1)
        if not self._screen.drawn and quarter > self._quarters[part]:
            self._screen.print(f"{self.title}: {part} {done}/{self._totals[part]}  {extra}".rstrip())
        self._quarters[part] = max(quarter, self._quarters[part])


def _progress(console: Console) -> Progress:
    """A bar that is drawn by whoever holds it; it never starts a display of its own."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[extra]}"),
        console=console,
        auto_refresh=False,
        speed_estimate_period=1800,  # steps of a large run take minutes; rich's 30 s would never see two
    )


def _cells(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, text) of what the line shows, in order; absent metrics are left out."""
    cells: list[tuple[str, str]] = []

    def add(label: str, key: str, form: str = ".2f") -> None:
        if key in values:
            cells.append((label, format(values[key], form)))

    add("s/step", names.STEP_SECONDS)
    for stage in names.STAGES:
        add(stage, names.stage_seconds(stage))
    if values.get(names.HIDDEN_SECONDS, 0.0) >= 0.01:
        add("hidden", names.HIDDEN_SECONDS)
    add("trees/s", names.TREES_PER_SECOND, ".1f")
    add("trees/h", names.TREES_PER_HOUR, ".0f")
    add("judge", names.JUDGE_SHARE, ".0%")
    if values.get(names.STALENESS):
        add("stale", names.STALENESS)
    for role in names.ROLES:
        for category in names.CATEGORIES:
            add(f"{role[0].upper()} {category}", names.reward(category, role))
    add("asr", names.ASR)
    add("comply", names.COMPLIANCE)
    add("exploit", names.EXPLOITABILITY, ".3f")
    add("over-refuse", names.OVER_REFUSAL, ".3f")
    for role in names.ROLES:
        add(f"loss {role[0].upper()}", names.loss(role), ".4f")
    cells.extend(_counters(values))
    return cells


def _counters(values: Mapping[str, float]) -> list[tuple[str, str]]:
    found = sorted((k, v) for k, v in values.items() if k.startswith(names.COUNTER_PREFIX) and v)
    return [(key.removeprefix(names.COUNTER_PREFIX), f"{value:g}") for key, value in found]


def _table(step: int, values: Mapping[str, float]) -> Table:
    def show(key: str, form: str = ".2f") -> str:
        return format(values[key], form) if key in values else "-"

    table = Table(box=None, padding=(0, 2), show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column()
    stages = "  ".join(f"{stage} {show(names.stage_seconds(stage))}" for stage in names.STAGES)
    table.add_row(
        f"step {step}",
        f"{show(names.STEP_SECONDS)} s  ({stages}  hidden {show(names.HIDDEN_SECONDS)})  "
        f"{show(names.TREES_PER_SECOND, '.1f')} trees/s  {show(names.TREES_PER_HOUR, '.0f')} trees/h",
    )
    if names.JUDGE_SHARE in values or values.get(names.STALENESS):
        engines = "  ".join(f"{role} {show(names.engine_seconds(role))}" for role in (*names.ROLES, "judge"))
        judge, stale = show(names.JUDGE_SHARE, ".0%"), show(names.STALENESS)
        table.add_row("engines", f"{engines} s  judge's share {judge}  staleness {stale}")
    for role in names.ROLES:
        rewards = "  ".join(f"{category} {show(names.reward(category, role))}" for category in names.CATEGORIES)
        table.add_row(role.capitalize(), f"reward {rewards}  loss {show(names.loss(role), '.4f')}")
    table.add_row("sampled", f"ASR {show(names.ASR)}  benign compliance {show(names.COMPLIANCE)}")
    if names.EXPLOITABILITY in values or names.OVER_REFUSAL in values:
        worst = f"exploitability {show(names.EXPLOITABILITY, '.3f')}"
        table.add_row("worst case", f"{worst}  over-refusal {show(names.OVER_REFUSAL, '.3f')}")
    if counters := _counters(values):
        table.add_row("counted", "  ".join(f"{name} {value}" for name, value in counters), style="yellow")
    return table


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
