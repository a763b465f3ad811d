"""Supervise the local stack: restart dead services, rotate logs, close lost runs, restart crashed runs.

`pedigree up` starts the keeper last and `pedigree down` stops it first. Its state is in `.pedigree/keeper.json`, which
`pedigree status` reads.
"""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from components.core.layout import Layout
from components.core.storage import write_json
from flows import live
from infra.local import supervisor
from infra.local.processes import LOG_LIMIT_BYTES
from infra.local.services import KEEPER_STATE, UnhealthyError, request
from infra.local.site import Site, StackError

LOOK_SECONDS = 2.0  # between checks of the processes
ASK_SECONDS = 30.0  # between health checks of the services
HUNG_SECONDS = 180.0  # a live but unhealthy service is restarted after this time
CALM_SECONDS = 600.0  # without a restart, after which the backoff is reset
LONGEST_WAIT_SECONDS = 300.0
CLOSE_SECONDS = 10.0
TAG = "pedigree"  # of the deployments of prefect.yaml
CRASHED_SECONDS = (60.0, 3600.0)  # since the crash: earlier, the automation may still act; later, leave it to the user

logger = logging.getLogger("keeper")


@dataclass
class Keeper:
    """State of the keeper.

    Args:
        restarts: service -> number of restarts, time and reason of the last.
        failure: why the last attempt to start services failed; empty if it succeeded.
        next_try: earliest time of the next attempt, in seconds since 1970.
        unhealthy_since: service -> time of the first of its consecutive failed checks.
    """

    root: Path
    restarts: dict[str, dict[str, object]] = field(default_factory=dict)
    failure: str = ""
    next_try: float = 0.0
    in_a_row: int = 0
    last_restart: float = 0.0
    unhealthy_since: dict[str, float] = field(default_factory=dict)
    asked: float = 0.0

    def look(self) -> None:
        """Check every service once, and restart those that are down, unless the backoff has not elapsed."""
        now = time.time()
        ask = now - self.asked > ASK_SECONDS
        self.asked = now if ask else self.asked
        reasons = {status.service: self._reason(status, now, ask) for status in supervisor.status(self.root, ask)}
        down = {service: reason for service, reason in reasons.items() if reason}
        if now - self.last_restart > CALM_SECONDS:
            self.in_a_row = 0
        if down and now >= self.next_try:
            self._revive(down)
        elif not down:
            self.failure = ""
        self._save()

    def _reason(self, status: supervisor.Status, now: float, asked: bool) -> str:
        """Return why a service must be restarted; empty if it need not be."""
        if status.service == "keeper":
            return ""
        if status.state in ("dead", "stopped"):
            return "its process had ended"
        if not asked:
            return ""
        if status.state == "healthy" or status.failing:
            self.unhealthy_since.pop(status.service, None)
            return ""
        since = self.unhealthy_since.setdefault(status.service, now)
        return f"it did not answer for {now - since:.0f} s" if now - since > HUNG_SECONDS else ""

    def _revive(self, down: dict[str, str]) -> None:
        revived: tuple[str, ...] = tuple(down)
        try:
            revived = supervisor.revive(self.root, revived, logger.info)
            self.failure = ""
        except StackError as error:
            self.failure = str(error)
            logger.error("%s", error)
        self.unhealthy_since.clear()
        if not revived:  # a command has restarted them meanwhile
            return
        for service in revived:
            logger.warning("%s: %s; started again", service, down[service])
            times = int(str(self.restarts.get(service, {"times": 0})["times"])) + 1
            when = f"{datetime.now():%Y-%m-%d %H:%M:%S}"
            self.restarts[service] = {"times": times, "last": when, "why": down[service]}
        self.in_a_row, self.last_restart = self.in_a_row + 1, time.time()
        self.next_try = self.last_restart + min(2.0**self.in_a_row, LONGEST_WAIT_SECONDS)

    def _save(self) -> None:
        state = {key: value for key, value in asdict(self).items() if key in ("restarts", "failure", "next_try")}
        write_json(Layout(self.root).state / KEEPER_STATE, state)


def close_lost_runs(root: Path) -> None:
    """Close runs whose process is gone, in a subprocess, because Prefect's and MLflow's clients are large."""
    if live.lost(root):
        done = subprocess.run(
            [sys.executable, "-m", "flows.live"], cwd=root, capture_output=True, text=True, check=False, timeout=300
        )
        for line in (done.stdout + done.stderr).splitlines():
            logger.warning("%s", line)


def start_crashed_again(site: Site, tries: dict[str, int]) -> None:
    """Restart runs that stay crashed: on a busy SQLite Prefect loses events, and with them automations.

    Like the automation of prefect.yaml, this restarts only started runs of deployments; the flow refuses a sixth try.

    Args:
        site: the stack.
        tries: run -> its start count at its last restart here. Each count is restarted once, because a run that crashes
            before it starts, as with a broken flow file, would crash for ever.
    """
    url, auth = site.url("prefect"), site.credentials["PREFECT_API_AUTH_STRING"]
    crashed = {"flow_runs": {"state": {"type": {"any_": ["CRASHED"]}}, "tags": {"all_": [TAG]}}, "limit": 20}
    crashed["sort"] = "END_TIME_DESC"
    try:
        for run in request(url, "/api/flow_runs/filter", auth, "POST", crashed):
            age = (datetime.now(UTC) - datetime.fromisoformat(run["state"]["timestamp"])).total_seconds()
            begun = run["deployment_id"] and run["run_count"] > tries.get(run["id"], 0)
            if begun and CRASHED_SECONDS[0] < age < CRASHED_SECONDS[1]:
                tries[run["id"]] = run["run_count"]
                state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Started again after a crash."}
                request(url, f"/api/flow_runs/{run['id']}/set_state", auth, "POST", {"state": state})
                logger.warning("%s had crashed, and Prefect's automation did not come; started again", run["name"])
    except UnhealthyError:  # reported by `look`
        return


def rotate_logs(site: Site) -> None:
    """Rotate each large service log; keep one earlier file.

    The services write in append mode, so that their open log can be truncated.
    """
    for log in site.log("x").parent.glob("*.log"):
        if log.stat().st_size > LOG_LIMIT_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            with log.open("r+") as file:
                file.truncate(0)


def main() -> None:
    """Supervise the stack of the given folder until SIGTERM, or until the folder is deleted."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    root = Path(sys.argv[1])
    keeper, closed, tries = Keeper(root), 0.0, dict[str, int]()
    logger.info("keeping the stack of %s", root)
    while (Layout(root).state / "stack.json").exists():
        try:
            keeper.look()
            rotate_logs(Site.load(root))
            if time.time() - closed > CLOSE_SECONDS:
                close_lost_runs(root)
                start_crashed_again(Site.load(root), tries)
                closed = time.time()
        except (OSError, StackError, subprocess.SubprocessError):
            logger.exception("the keeper could not check the stack; it continues")
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
