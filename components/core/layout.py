"""Where things lie in a workspace: the paths that `dvc.yaml` names, and the state beside them.

A workspace is the checkout or a run's folder; a run's folder links to the checkout's `.pedigree`. Every stage imports
this module, so a change of its code makes all stages run again. Therefore a file of `.pedigree` that only one module
of `flows` or `infra` knows is named there, below `Layout.state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRAINING_CONFIG, TRAINING_LOCK = "config.json", "lock"  # in a folder of `Layout.checkpoints`; the lock is a record lock


@dataclass(frozen=True)
class Layout:
    """Paths below `root`; without it they are relative, as `dvc.yaml` and `dvc.lock` name them."""

    root: Path = Path()

    @property
    def pipeline(self) -> Path:
        """The stages, for DVC and for us."""
        return self.root / "dvc.yaml"

    @property
    def dvc_lock(self) -> Path:
        """What went into each stage and came out of it."""
        return self.root / "dvc.lock"

    @property
    def params(self) -> Path:
        """The values of a run's parameters."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """Folder of all data."""
        return self.root / "data"

    @property
    def pool(self) -> Path:
        """Snapshots of images to train on, by source."""
        return self.data / "pool"

    @property
    def evaluation(self) -> Path:
        """Snapshots of images to evaluate on, by source."""
        return self.data / "evaluation"

    @property
    def embeddings(self) -> Path:
        """Curation vectors and scores of both collections."""
        return self.data / "embeddings"

    @property
    def curated(self) -> Path:
        """The training set."""
        return self.data / "curated"

    @property
    def models(self) -> Path:
        """Folder of all weights."""
        return self.root / "models"

    @property
    def students(self) -> Path:
        """Weights of the students, by name."""
        return self.models / "students"

    def weights(self, name: str) -> Path:
        """Weights that a stage makes of one model: `pretrained` or `adapted`."""
        return self.models / name

    @property
    def reports(self) -> Path:
        """Folder of all reports."""
        return self.root / "reports"

    def report(self, stage: str, item: str | None = None) -> Path:
        """Report of a stage, or of one of its students or models."""
        return self.reports / stage / (item or "")

    def result(self, stage: str, item: str | None = None) -> Path:
        """Figures of a stage, which DVC takes as metrics."""
        return self.report(stage, item) / "result.json"

    @property
    def code_lists(self) -> Path:
        """Lists of the code that each stage can load."""
        return self.reports / "code"

    @property
    def dvc(self) -> Path:
        """DVC's own folder."""
        return self.root / ".dvc"

    @property
    def dvc_settings(self) -> Path:
        """DVC's settings, in git."""
        return self.dvc / "config"

    @property
    def dvc_local_settings(self) -> Path:
        """DVC's settings of this machine: endpoint and credentials of the remote."""
        return self.dvc / "config.local"

    @property
    def dvc_cache(self) -> Path:
        """DVC's objects, by their ids."""
        return self.dvc / "cache"

    @property
    def state(self) -> Path:
        """What neither git nor DVC keeps."""
        return self.root / ".pedigree"

    @property
    def runs(self) -> Path:
        """A folder and a lock file for each run; only in the checkout."""
        return self.state / "runs"

    def checkpoints(self, key: str = "") -> Path:
        """Folder of a training that is not delivered yet, by its run key; without one, the folder of all of them."""
        return self.state / "checkpoints" / key

    def cache(self, name: str = "") -> Path:
        """What can be fetched or computed again, by kind; without a name, the folder of all kinds."""
        return self.state / "cache" / name

    @property
    def trained(self) -> Path:
        """Trainings that are finished and that their stage has not taken up yet, and students, by run key."""
        return self.cache("trained")

    @property
    def streamed(self) -> Path:
        """Manifest and shard addresses of a curated set that is not on disk."""
        return self.state / "streamed"

    @property
    def data_docs(self) -> Path:
        """Pages of Great Expectations."""
        return self.state / "data-docs"


RELATIVE = Layout()
