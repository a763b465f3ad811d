"""Display of a run: live on a terminal, elsewhere lines with times."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from components.core.progress import ProgressLine, clock

DETAIL = {"detail": True}  # `extra` of log lines that the live display replaces
LOG_EVERY_SECONDS = 9.0  # between log lines on the same work, which reports every 10 s
BAR_WIDTH = 20
STYLES = {logging.WARNING: "yellow", logging.ERROR: "red"}


@dataclass
class _Work:
    """Work in progress: a stage, or a task of this process."""

    doing: str
    begun: float
    line: ProgressLine | None = None  # the latest
    seen: float = 0.0  # when it came
    logged: float = float("-inf")

    @property
    def seconds_left(self) -> float | None:
        """Remaining time by the latest line, minus the time since."""
        if self.line is None or self.line.seconds_left is None:
            return None
        return max(self.line.seconds_left - (time.monotonic() - self.seen), 0.0)


class Board:
    """State of a run, rendered by rich. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.plan([], {})

    def plan(self, stages: Sequence[str], trainings: Mapping[str, tuple[int, int]]) -> None:
        """Start displaying a run.

        Args:
            stages: their names, in order.
            trainings: steps and batch size of the training stages.
        """
        with self._lock:
            self._stages, self._trainings = list(stages), dict(trainings)
            self._now: dict[str, _Work] = {}
            self._begun, self._done, self._trained = time.monotonic(), 0, set[str]()
            self._images_per_second: float | None = None

    @contextmanager
    def working(self, name: str, what: str) -> Iterator[None]:
        """Display a stage or other work inside the block."""
        self.doing(name, what)
        try:
            yield
            with self._lock:
                self._done += name in self._stages
                self._trained.add(name)
        finally:
            with self._lock:
                self._now.pop(name, None)

    def doing(self, name: str, what: str) -> None:
        """Set the description of work without progress."""
        with self._lock:
            work = self._now.setdefault(name, _Work(what, time.monotonic()))
            work.doing, work.line = what, None

    def move(self, name: str, line: ProgressLine) -> bool:
        """Update progress; return whether to log it now."""
        with self._lock:
            now = time.monotonic()
            work = self._now.setdefault(name, _Work(line.what, now))
            work.line, work.seen = line, now
            if line.unit == "steps" and name in self._trainings:
                self._images_per_second = line.rate * self._trainings[name][1]
            ended = line.done >= line.total
            should_log = ended or now - work.logged >= LOG_EVERY_SECONDS
            if should_log:
                work.logged = now
            if ended and name not in self._stages:
                del self._now[name]
            return should_log

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = min(options.max_width // 8, BAR_WIDTH)
        with self._lock:
            rows = [self._row(name, work, width) for name, work in self._now.items()]
            summary = self._summary() if self._stages else ""
        if rows:
            grid = Table.grid(padding=(0, 1), expand=True)
            for style in ("dim", "bold", "", ""):
                # Cropped, because rich's ellipsis takes six characters on a terminal without UTF-8.
                grid.add_column(no_wrap=True, overflow="crop", style=style)
            grid.columns[-1].ratio = 1
            for row in rows:
                grid.add_row(*row)
            yield grid
        if summary:
            yield Text(summary, no_wrap=True, overflow="crop")

    def _row(self, name: str, work: _Work, width: int) -> tuple[RenderableType, ...]:
        number = f"{self._stages.index(name) + 1} of {len(self._stages)}" if name in self._stages else ""
        line, elapsed = work.line, clock(time.monotonic() - work.begun)
        if line is None:
            bar = ProgressBar(width=width, pulse=True, animation_time=time.monotonic())
            return number, name, bar, f"{work.doing}, {elapsed} so far"
        bar = ProgressBar(total=max(line.total, 1), completed=line.done, width=width)
        left = "" if work.seconds_left is None else f"{clock(work.seconds_left)} left, "
        what = "" if line.what == name else f"{line.what}: "
        note = line.note or f"{line.rate:.1f} {line.unit}/s"
        # The most important part first, because narrow terminals crop the rest.
        return number, name, bar, f"{what}{left}{note}, {line.done}/{line.total} {line.unit}, {elapsed} so far"

    def _summary(self) -> str:
        said = f"{self._done} of {len(self._stages)} stages done in {clock(time.monotonic() - self._begun)}"
        left = self._training_left()
        return said if left is None else f"{said}; training takes about {clock(left)} more, at this speed"

    def _training_left(self) -> float | None:
        """Return the remaining seconds of all trainings at the speed of the latest one; None if unknown."""
        if not self._images_per_second:
            return None
        now = {name: work.seconds_left for name, work in self._now.items() if work.line is not None}
        left = 0.0
        for name, (steps, batch_size) in self._trainings.items():
            if name not in self._trained:
                seconds = now.get(name)
                left += steps * batch_size / self._images_per_second if seconds is None else seconds
        return left if left >= 1 else None


board = Board()  # of this process's run


class Screen(logging.Handler):
    """Write log records to stderr; inside `shown` with times, or above the live display."""

    def __init__(self) -> None:
        super().__init__()
        self.console: Console | None = None  # of the live display
        self.timed = False
        self.said_at_end = ""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: D102
        try:
            if (text := self._text(record)) is not None:
                self._write(text, record)
        except Exception:  # as in all handlers of `logging`
            self.handleError(record)

    def _text(self, record: logging.LogRecord) -> str | None:
        """Return the text of a record; None if it is hidden."""
        progress = ProgressLine.parse(record.getMessage())  # of this process; a stage's line has its name as prefix
        if progress is not None:
            should_log = board.move(progress.what, progress)
            return f"{progress.what}: {progress.figures}" if should_log and self.console is None else None
        if self.console is not None and getattr(record, "detail", False):
            return None
        if record.name == self.said_at_end and record.levelno < logging.WARNING:
            return None
        text = self.format(record)
        word = record.levelname.lower()
        return f"{word}: {text}" if self.timed and record.levelno >= logging.WARNING else text

    def _write(self, text: str, record: logging.LogRecord) -> None:
        if self.console is not None:
            style = STYLES.get(record.levelno, "")
            self.console.print(Text(text, style), soft_wrap=True)
            return
        when = time.strftime("%Y-%m-%d %H:%M:%S ", time.localtime(record.created)) if self.timed else ""
        sys.stderr.write(f"{when}{text}\n")
        sys.stderr.flush()


screen = Screen()  # of this process


@contextmanager
def shown(quiet: bool = False, said_at_end: str = "") -> Iterator[None]:
    """Display progress and logs on stderr inside the block; stdout is reserved for the command's result.

    Args:
        quiet: only warnings and errors.
        said_at_end: a logger whose lines are hidden, because the command's result repeats them.
    """
    console = Console(stderr=True, highlight=False)
    live = sys.stderr.isatty() and console.is_interactive and not quiet
    screen.timed, screen.said_at_end = True, said_at_end
    screen.setLevel(logging.WARNING if quiet else logging.NOTSET)
    try:
        with redirect_stdout(sys.stderr):
            if not live:
                yield
                return
            with Live(get_renderable=lambda: board, console=console, refresh_per_second=2, transient=True):
                screen.console = console
                try:
                    yield
                finally:
                    screen.console = None
    finally:
        screen.timed, screen.said_at_end = False, ""
        screen.setLevel(logging.NOTSET)
