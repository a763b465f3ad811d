"""Keeps the local stack running: restarts dead services, rotates logs, closes lost runs, starts crashed ones again.

`pedigree up` starts it last and `pedigree down` stops it first. What it did is in `.pedigree/keeper.json`, which
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

LOOK_SECONDS = 2.0  # between looks at the processes
ASK_SECONDS = 30.0  # between questions to the services whether they work
HUNG_SECONDS = 180.0  # a service whose process lives, but that has not been healthy for so long, is started again
CALM_SECONDS = 600.0  # after so long without a restart the waiting begins with its shortest again
LONGEST_WAIT_SECONDS = 300.0
CLOSE_SECONDS = 10.0
TAG = "pedigree"  # of the deployments of prefect.yaml
CRASHED_SECONDS = (60.0, 3600.0)  # ago: before, the automation may still come; after it, a person knows better

logger = logging.getLogger("keeper")


@dataclass
class Keeper:
    """What the keeper has seen and done.

    Args:
        restarts: service -> how often it was started again, when last and why.
        failure: why the last attempt to start services failed; empty if it did not.
        next_try: when the next attempt is due, where a service is down; seconds since 1970.
        unhealthy_since: service -> time since when its check fails.
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
        """Look at every service once, and start again what is down, unless that must wait."""
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
        """Why a service must be started again; empty if it need not."""
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
        if not revived:  # a command started them meanwhile
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
    """Close runs whose process is gone, in a process of its own: Prefect's and MLflow's clients are large."""
    if live.lost(root):
        done = subprocess.run(
            [sys.executable, "-m", "flows.live"], cwd=root, capture_output=True, text=True, check=False, timeout=300
        )
        for line in (done.stdout + done.stderr).splitlines():
            logger.warning("%s", line)


def start_crashed_again(site: Site, tries: dict[str, int]) -> None:
    """Start runs again that have crashed and stay so: on a busy SQLite Prefect loses events, and with them automations.

    As the automation of prefect.yaml: only runs of deployments that had begun; the flow itself refuses a sixth try.

    Args:
        site: the stack.
        tries: run -> how often it had begun when it was started again, once for each number: a run that crashes before
            it begins, as with a broken flow file, would crash for ever.
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
    except UnhealthyError:  # `look` says so
        return


def rotate_logs(site: Site) -> None:
    """Begin each service's log anew where it is large; one earlier part is kept.

    The services write in append mode, so that a log can be cut under them.
    """
    for log in site.log("x").parent.glob("*.log"):
        if log.stat().st_size > LOG_LIMIT_BYTES:
            shutil.copyfile(log, log.with_suffix(".log.1"))
            with log.open("r+") as file:
                file.truncate(0)


def main() -> None:
    """Keep the stack of the folder that is named until SIGTERM, or until the folder is deleted."""
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
            logger.exception("the keeper could not look at the stack; it goes on")
        time.sleep(LOOK_SECONDS)


if __name__ == "__main__":
    main()
