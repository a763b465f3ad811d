"""Encode the level of a stage's log lines as a prefix, because the flow reads only the stage's output."""

from __future__ import annotations

import logging

ERROR, WARNING = "error: ", "warning: "  # the reason of the stage's end; a problem that did not end it


class LevelFormatter(logging.Formatter):
    """Prefix messages of warning level and above."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        text = super().format(record)
        return text if record.levelno < logging.WARNING or text.startswith((ERROR, WARNING)) else WARNING + text


def read_level(line: str) -> tuple[int, str]:
    """Return the level of a line that `LevelFormatter` wrote, and its text without the prefix."""
    for word, level in ((ERROR, logging.ERROR), (WARNING, logging.WARNING)):
        if line.startswith(word):
            return level, line.removeprefix(word)
    return logging.INFO, line
