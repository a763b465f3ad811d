"""`pedigree doctor`: list what a run needs and lacks, and what to do about it."""

from __future__ import annotations

import os
from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.commands.decorators import Answer, command
from flows.health import RED, Finding, diagnose
from infra.local import supervisor
from infra.local.site import StackError


@command()
def doctor() -> Answer:
    """Check everything that a run needs: packages, git, S3, DVC, MLflow, Prefect, its worker and schedules.

    Green: works. Yellow: works, but needs attention. Red: a run fails or never starts; exits with 1. Changes nothing.

    Examples:
      pedigree doctor

      pedigree doctor --json
    """
    checkout, findings = Path.cwd(), []
    try:
        os.environ.update(supervisor.connect(checkout, start=False))
    except StackError as error:
        findings.append(Finding("services", RED, str(error)))
    findings += diagnose(checkout, services=not findings)
    lacks = any(finding.state == RED for finding in findings)
    return Answer([asdict(finding) for finding in findings], partial(_show, findings), exit_code=int(lacks))


def _show(findings: list[Finding]) -> None:
    table = Table("", "check", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        state = Text(finding.state, style=finding.state)
        table.add_row(state, Text(finding.check), Text(finding.detail), Text(finding.advice))
    Console().print(table)
