"""Times that a person gives to a command."""

from __future__ import annotations

import datetime

from components.core.config import ConfigError


def parse_time(option: str, text: str) -> datetime.datetime:
    """Return the time of an option's text in ISO 8601; UTC where it names no zone.

    Raises:
        ConfigError: it is no time.
    """
    try:
        time = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{option} {text}: expected a time such as 2026-11-29 or 2026-11-29T14:30+01:00") from None
    return time if time.tzinfo else time.replace(tzinfo=datetime.UTC)
