"""What a person sees of a run: a bar with rate and time left for everything that takes time, plain lines otherwise."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:.2f}/s" if speed else "-/s", style="progress.data.speed")


class Bar:
    """One running bar; :meth:`advance` moves it by one."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, note: str = "") -> None:
        self._progress.update(self._task, advance=1, note=note)

    def move_to(self, done: int, total: int) -> None:
        """Sets the bar to ``done`` of ``total``."""
        self._progress.update(self._task, completed=done, total=total)


class Reporter:
    """Writes to one console; ``quiet`` leaves only warnings."""

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console or Console(stderr=True)
        self.quiet = quiet

    def line(self, text: str) -> None:
        """A plain line."""
        if not self.quiet:
            self.console.print(text, highlight=False)

    def warn(self, text: str) -> None:
        """A line that is shown even when quiet."""
        self.console.print(f"[yellow]warning:[/yellow] {text}", highlight=False)

    @contextmanager
    def bar(self, name: str, total: int, done: int = 0) -> Iterator[Bar]:
        """A bar of ``total`` steps of which ``done`` are already behind us (a resumed stage).

        Where the output is no terminal, one line at the end takes its place.
        """
        live = self.console.is_terminal and not self.quiet
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            _Rate(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        progress = Progress(*columns, console=self.console, disable=not live)
        with progress:
            task = progress.add_task(name, total=total, completed=done, note="")
            yield Bar(progress, task)
        if not live:
            self.line(f"{name}: {total} of {total}")
