"""The user of this process."""

from __future__ import annotations

import getpass
import os

# MLflow users of the local stack, which all who work with it share: they name a role, not a person.
ADMIN, TRAINER, REVIEWER = "admin", "trainer", "reviewer"
SHARED_LOGINS = (ADMIN, TRAINER, REVIEWER)


def user_name() -> str:
    """Return the user's name; the numeric id if the system has no name for it, as in a container."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
