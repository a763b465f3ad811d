"""The systemd units: systemd itself takes them, they name programs that exist, and nothing of one machine."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
UNITS = sorted((ROOT / "infra/systemd").glob("*/*.service"))
ANALYZE = shutil.which("systemd-analyze")


def service(unit: Path) -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit)
    assert set(parser.sections()) == {"Unit", "Service", "Install"}
    return parser["Service"]


@pytest.mark.skipif(ANALYZE is None, reason="systemd-analyze is not installed (Debian: apt-get install systemd)")
@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.parent.name}-{unit.stem}")
def test_systemd_takes_the_unit(unit, tmp_path):
    (tmp_path / unit.name).write_text(unit.read_text())
    arguments = ["--man=no", f"--{unit.parent.name}", "verify", str(tmp_path / unit.name)]
    env = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run([str(ANALYZE), *arguments], env=env, capture_output=True, text=True, check=False, timeout=60)
    said = [line for line in (done.stdout + done.stderr).splitlines() if unit.stem in line]
    assert (done.returncode, said) == (0, [])


def test_there_is_one_of_each_for_a_person_and_for_a_machine():
    names = {(unit.parent.name, unit.stem) for unit in UNITS}
    assert names == {(kind, f"pedigree-{what}") for kind in ("user", "system") for what in ("stack", "worker")}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: f"{unit.parent.name}-{unit.stem}")
def test_a_unit_starts_what_exists_and_names_no_machine(unit):
    values = service(unit)
    system, worker = unit.parent.name == "system", unit.stem.endswith("worker")
    assert values["WorkingDirectory"] == ("/srv/pedigree" if system else "%h/pedigree")
    assert values.get("User") == ("pedigree" if system else None)
    assert not re.search(r"/(home|root|work|tmp|opt)\b", unit.read_text())
    program = {"worker": "prefect", "stack": "pedigree"}[unit.stem.removeprefix("pedigree-")]
    assert values["ExecStart"].startswith(f"/usr/bin/env .venv/bin/{program} ")
    if worker:
        expected = {"Restart": "always", "KillSignal": "SIGTERM", "TimeoutStopSec": "120"}
        assert values["EnvironmentFile"].endswith("/pedigree/worker.env")
        assert " worker start --pool pedigree --type process " in values["ExecStart"]
    else:
        expected = {"Type": "oneshot", "RemainAfterExit": "yes", "ExecStop": "/usr/bin/env .venv/bin/pedigree down"}
    assert {key: values[key] for key in expected} == expected
    assert "MemoryDenyWriteExecute" not in values  # torch compiles
