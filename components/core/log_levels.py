"""The level of a stage's log lines, as a word in front of them: its process is known by its output only."""

from __future__ import annotations

import logging

ERROR, WARNING = "error: ", "warning: "  # why the stage ended; what it went on in spite of


class LevelFormatter(logging.Formatter):
    """The message, with a word in front of it if it is a warning or worse."""

    def format(self, record: logging.LogRecord) -> str:  # noqa: D102
        text = super().format(record)
        return text if record.levelno < logging.WARNING or text.startswith((ERROR, WARNING)) else WARNING + text


def read_level(line: str) -> tuple[int, str]:
    """The level of a line that `LevelFormatter` has written, and its text without the word."""
    for word, level in ((ERROR, logging.ERROR), (WARNING, logging.WARNING)):
        if line.startswith(word):
            return level, line.removeprefix(word)
    return logging.INFO, line
