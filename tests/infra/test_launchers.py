"""The launchers of infra/: Slurm's really runs here, with stand-ins for its commands; Kubernetes' says the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from torch.distributed.run import config_from_args, parse_args

from components.core.config import load_yaml
from components.recipe import RECIPES
from components.training import torchrun
from components.training.parallelize import SAVE_SECONDS
from tests.training.conftest import backbone, curated, pretrain_values, tiny, workspace  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]
SLURM = ROOT / "infra" / "slurm" / "pretrain.sbatch"
STAND_INS = {
    # One task on this machine, to which it hands signals on.
    "srun": 'while [[ $1 = -* ]]; do echo "$1" >> srun_options; shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> requeued; fi',
}


def manifests() -> dict[str, dict[str, Any]]:
    found = yaml.safe_load_all((ROOT / "infra" / "kubernetes" / "training.yaml").read_text())
    return {manifest["kind"]: manifest for manifest in found}


def free_port() -> int:
    for port in range(20_000, 30_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)):
                return port
    raise AssertionError("no port is free")


def slurm_environment(folder: Path) -> dict[str, str]:
    for name, body in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port() - 20_000), "SLURM_JOB_NODELIST": "node[1]", "SLURM_NNODES": "1"}
    job |= {"SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "96"}
    known = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "SLURM_"))}
    path = os.pathsep.join((str(folder), str(Path(sys.executable).parent), os.environ["PATH"]))
    return known | job | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_slurm_trains_on_two_ranks_and_queues_again_when_told_to_go(workspace, pretrain_values, tmp_path_factory):  # noqa: F811
    recipe = load_yaml(RECIPES / "tiny-cpu.yaml")
    recipe["pretrain"] = pretrain_values(steps=5_000, checkpoint_every_steps=5, sharding="fsdp")
    for stage in ("adapt", "distill"):
        recipe[stage]["crops"] |= {"global_size": 48, "local_size": 24}  # multiples of its patch size, 8
    recipe["distill"]["students"]["small"]["backbone"]["patch_size"] = 8
    recipe["evaluate"]["preprocessing"]["crop_size"] = 48
    (workspace / "params.yaml").write_text(yaml.safe_dump(recipe))
    env = slurm_environment(tmp_path_factory.mktemp("bin"))
    with subprocess.Popen(
        ["bash", str(SLURM)], cwd=workspace, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as job:
        until = time.monotonic() + 120
        while not list(workspace.glob(".pedigree/checkpoints/*/step_*")) and job.poll() is None:
            assert time.monotonic() < until
            time.sleep(0.05)
        job.send_signal(signal.SIGTERM)
        log = job.communicate(timeout=120)[0]
    assert job.returncode == os.EX_TEMPFAIL, log
    assert "start it again to go on" in log
    assert "Traceback" not in log
    assert (workspace / "requeued").read_text() == f"requeue {env['SLURM_JOB_ID']}\n"
    assert "--cpus-per-task=96" in (workspace / "srun_options").read_text().splitlines()
    saved = list(workspace.glob(".pedigree/checkpoints/*/step_*/*.safetensors"))
    assert {path.name[:11] for path in saved} == {"shard-00001", "shard-00002"}  # one of each rank


def test_by_hand_ranks_have_as_long_to_save_as_those_that_a_stage_starts(monkeypatch):
    waits: list[int | None] = []
    monkeypatch.setattr(torchrun, "run", lambda given: waits.append(config_from_args(given)[0].shutdown_timeout))
    for own in ([], ["--shutdown-timeout=7"]):
        monkeypatch.setattr(sys, "argv", ["torchrun", *own, "-m", "components", "pretrain"])
        torchrun.main()
    assert waits == [SAVE_SECONDS, 7]


def test_kubernetes_starts_the_same_command_on_every_machine():
    job, service = manifests()["Job"], manifests()["Service"]
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"][:3] == ["python", "-m", "components.training.torchrun"]
    told = parse_args(container["command"][3:])
    assert (told.module, told.training_script, told.training_script_args) == (True, "components", ["pretrain"])
    assert int(told.nnodes) == job["spec"]["completions"] == job["spec"]["parallelizm"]
    assert int(told.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    # Pod 0 of an indexed job is named <job>-0 in the domain of the service that selects the job's pods.
    name = job["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    assert told.rdzv_endpoint.split(":")[0] == f"{name}-0.{pod['subdomain']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    ignored = job["spec"]["podFailurePolicy"]["rules"][0]
    assert (ignored["action"], ignored["onExitCodes"]["values"]) == ("Ignore", [os.EX_TEMPFAIL])
    assert pod["terminationGracePeriodSeconds"] > told.shutdown_timeout
    # What Slurm runs has the same options.
    slurm = SLURM.read_text()
    for option in ("rdzv-backend=c10d", "shutdown-timeout=280", "nnodes=", "nproc-per-node=", "-m components"):
        assert option in slurm
        assert option in " ".join(container["command"])
