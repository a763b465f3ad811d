"""Start ranks, join their process group, and wrap or shard the networks."""

from __future__ import annotations

import logging
import os
import signal
import uuid
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel

from components.core.distributed import full_tensor, is_distributed, rank
from components.core.errors import EngineError, OutOfMemoryError, known
from components.core.mlflow_client import TrackingError
from components.core.storage import StorageError
from components.model.head import ProjectionHead
from components.model.vit import VisionTransformer
from components.training.config import TrainingConfig
from components.training.initial import fill
from components.training.networks import Network, Networks

EXIT_INTERRUPTED = 75  # EX_TEMPFAIL: stopped on request after a checkpoint; start it again to resume
# What a rank hands over as it is; of other errors of ours it hands over an EngineError that names them.
RANK_ERRORS = {kind.__name__: kind for kind in (EngineError, OutOfMemoryError, StorageError, TrackingError)}
SAVE_SECONDS = 300  # time for ranks to finish their step and write a checkpoint after SIGTERM


def launch(stage: Callable[..., dict[str, Any]], num_processes: int, *args: Any) -> dict[str, Any]:
    """Run `stage(*args)` on one or several ranks, and return the result of rank 0.

    Under torchrun (RANK is set) this process is one of its ranks. Otherwise processes are started as by
    `torchrun --standalone`.

    Args:
        stage: a picklable function, that is one of a module.
        num_processes: processes to start on this machine; ignored under torchrun.
        args: picklable arguments.

    Raises:
        EngineError: a started rank failed with an expected error.
        StorageError, TrackingError: it failed because of the object store or MLflow; a retry may succeed.
        RuntimeError: it failed by a defect; the rank's traceback is a note.
        SystemExit: with EXIT_INTERRUPTED after the ranks stopped on request and saved a checkpoint.
    """
    if "RANK" in os.environ:
        return _as_rank(stage, *args)
    if num_processes == 1:
        return stage(*args)
    return _start_ranks(stage, num_processes, *args)


def training_device() -> torch.device:
    """Return this rank's GPU if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def parallelize(networks: Networks, config: TrainingConfig, device: torch.device) -> nn.Module:
    """Prepare the networks of a run, once, before its optimizer is built; return the wrapped student to call.

    This is the only place that wraps networks, in this order:

    1. activation checkpointing, of the student's blocks;
    2. `torch.compile`, of each block with its checkpointing;
    3. FSDP2 (`fully_shard`), of all networks, which gathers and frees a block outside of its compiled code. Each rank
       allocates only its local shards of networks on the meta device;
    4. initial values, into the allocated shards;
    5. DistributedDataParallel, of the student, because it compares the values of all ranks.

    A teacher that an earlier call prepared for another student is not changed.
    """
    networks.student.backbone.checkpoint_activations(config.activation_checkpointing)
    if config.compile:
        for network in {networks.student, networks.teacher}:
            for block in network.backbone.blocks:
                block.compile()
    new = [network for network in networks.distinct() if not isinstance(network, FSDPModule)]
    if is_distributed() and config.sharding == "fsdp":
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        for network in new:
            _shard(network, mesh, config.bfloat16)
    _set_initial_values(new, device)
    if is_distributed() and config.sharding == "ddp":
        return DistributedDataParallel(networks.student, [device.index] if device.type == "cuda" else None)
    return networks.student


def _set_initial_values(networks: Sequence[Network], device: torch.device) -> None:
    """Allocate and fill networks that are on the meta device; move the others to the device."""
    empty = [network for network in networks if network.initial is not None]
    for network in networks:
        if network.initial is None:
            network.to(device)
        else:
            network.to_empty(device=device)
    fill(empty)


def gather(network: Network) -> Network | None:
    """Return the network with full tensors on rank 0; None on other ranks. Every rank must call."""
    if not isinstance(network, FSDPModule):
        return network if rank() == 0 else None
    tensors = {}
    for name, tensor in network.state_dict().items():
        value = full_tensor(tensor)
        if rank() == 0:
            tensors[name] = value.cpu()
    if rank() > 0:
        return None
    with torch.device("meta"):
        heads = {name: ProjectionHead(head.in_dim, head.config) for name, head in network.heads.items()}
        gathered = Network(VisionTransformer(network.backbone.config), heads)
    gathered.load_state_dict(tensors, assign=True)
    return gathered.eval().requires_grad_(False)


def _shard(network: Network, mesh: DeviceMesh, bfloat16: bool) -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    # torch warns of in-place changes of module outputs, which this code does not make.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for module in (*network.backbone.blocks, network.dino_head, network.ibot_head, network):
        # Reshard the root too: unsharded parameters would hide the next EMA update.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    for method in ("targets", "class_tokens", "patch_tokens"):
        register_fsdp_forward_method(network, method)


def _start_ranks(stage: Callable[..., dict[str, Any]], num_processes: int, *args: Any) -> dict[str, Any]:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        max_restarts=0,
        shutdown_timeout=SAVE_SECONDS,
    )
    level = logging.getLogger().getEffectiveLevel()
    for name in ("torch.distributed.elastic", "torch.multiprocessing", "torchelastic-events-null"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # the error of a rank is raised below, in one line
    try:
        threads = max(1, torch.get_num_threads() // num_processes)  # divide this process's threads (OMP_NUM_THREADS)
        return elastic_launch(config, _started_rank)(level, threads, stage, *args)[0]
    except ChildFailedError as error:
        number, failure = error.get_first_failure()
        if failure.exitcode == EXIT_INTERRUPTED:
            raise SystemExit(EXIT_INTERRUPTED) from None
        raise _rank_error(f"rank {number} of {num_processes}", failure.message) from None
    except SignalException as error:
        raise SystemExit(EXIT_INTERRUPTED if error.sigval == signal.SIGTERM else 128 + error.sigval) from None


def _rank_error(who: str, message: Any) -> Exception:
    """Convert a rank's failure: a mapping if it raised an exception, text if a signal killed it."""
    raised = isinstance(message, dict)
    reason = str(message["message"] if raised else message).strip().splitlines()[0]
    kind = reason.partition(":")[0] if raised else EngineError.__name__
    if kind not in RANK_ERRORS:
        error = RuntimeError(f"{who}: {reason}")
        error.add_note(message["extraInfo"]["py_callstack"])
        return error
    killed = not raised and "SIGKILL" in reason
    text = f"{who}: {reason.removeprefix(f'{EngineError.__name__}: ')}"
    return OutOfMemoryError(f"{text}, as where memory runs out") if killed else RANK_ERRORS[kind](text)


def _started_rank(level: int, threads: int, stage: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    first = os.environ["RANK"] == "0"
    logging.basicConfig(level=level if first else logging.WARNING, format="%(message)s")
    torch.set_num_threads(threads)
    try:
        return _as_rank(stage, *args)
    except Exception as error:
        found = known(error)
        if found is None:
            raise
        kind = type(found).__name__
        raise (found if kind in RANK_ERRORS else EngineError(f"{kind}: {found}")) from error


def _as_rank(stage: Callable[..., dict[str, Any]], *args: Any) -> dict[str, Any]:
    device = training_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            return stage(*args)
        finally:
            dist.destroy_process_group()
    except RuntimeError as error:  # Gloo's errors have no specific type
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):
            raise EngineError(str(error).splitlines()[0]) from error  # another rank ended, or the network failed
        raise
