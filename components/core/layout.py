"""Paths of a workspace: those that `dvc.yaml` names, and local state.

A workspace is the checkout or a run's folder, which links to the checkout's `.pedigree`. Every stage imports this
module, so a change of its code runs all stages again. Therefore a file of `.pedigree` that only one module of `flows`
or `infra` uses is named there, below `Layout.state`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TRAINING_CONFIG, TRAINING_LOCK = "config.json", "lock"  # in a folder of `Layout.checkpoints`; the lock is a record lock


@dataclass(frozen=True)
class Layout:
    """Paths below `root`; relative by default, as in `dvc.yaml` and `dvc.lock`."""

    root: Path = Path()

    @property
    def pipeline(self) -> Path:
        """The definition of the stages."""
        return self.root / "dvc.yaml"

    @property
    def dvc_lock(self) -> Path:
        """The recorded inputs and outputs of each stage."""
        return self.root / "dvc.lock"

    @property
    def params(self) -> Path:
        """The parameters of a run."""
        return self.root / "params.yaml"

    @property
    def data(self) -> Path:
        """Folder of all data."""
        return self.root / "data"

    @property
    def pool(self) -> Path:
        """Snapshots of training images, by source."""
        return self.data / "pool"

    @property
    def evaluation(self) -> Path:
        """Snapshots of evaluation images, by source."""
        return self.data / "evaluation"

    @property
    def embeddings(self) -> Path:
        """Embeddings and scores of both collections."""
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
        """Return the weights folder `pretrained` or `adapted`."""
        return self.models / name

    @property
    def reports(self) -> Path:
        """Folder of all reports."""
        return self.root / "reports"

    def report(self, stage: str, item: str | None = None) -> Path:
        """Return the report folder of a stage, or of one of its students or models."""
        return self.reports / stage / (item or "")

    def result(self, stage: str, item: str | None = None) -> Path:
        """Return the metrics file of a stage."""
        return self.report(stage, item) / "result.json"

    def by_image(self, model: str) -> Path:
        """Return the file of an evaluated model's scores by test image."""
        return self.report("evaluate", model) / "by_image.parquet"

    @property
    def code_lists(self) -> Path:
        """Lists of the source files that each stage can import."""
        return self.reports / "code"

    @property
    def dvc(self) -> Path:
        """DVC's own folder."""
        return self.root / ".dvc"

    @property
    def dvc_settings(self) -> Path:
        """DVC's settings that git tracks."""
        return self.dvc / "config"

    @property
    def dvc_local_settings(self) -> Path:
        """DVC's local settings: endpoint and credentials of the remote."""
        return self.dvc / "config.local"

    @property
    def dvc_cache(self) -> Path:
        """DVC's content-addressed objects."""
        return self.dvc / "cache"

    @property
    def state(self) -> Path:
        """Local state that neither git nor DVC tracks."""
        return self.root / ".pedigree"

    @property
    def runs(self) -> Path:
        """Folder and lock file of each run; only in the checkout."""
        return self.state / "runs"

    def checkpoints(self, key: str = "") -> Path:
        """Return the folder of an unfinished training by its run key; without a key, their parent folder."""
        return self.state / "checkpoints" / key

    def cache(self, name: str = "") -> Path:
        """Return a cache folder by kind; without a name, the parent of all caches."""
        return self.state / "cache" / name

    @property
    def trained(self) -> Path:
        """Results of finished trainings that their stage has not yet delivered, and of students, by run key."""
        return self.cache("trained")

    @property
    def streamed(self) -> Path:
        """Manifest and shard addresses of a streamed curated set."""
        return self.state / "streamed"

    @property
    def audit_heads(self) -> Path:
        """The last verified entry of each chain of the audit log."""
        return self.state / "audit-heads"

    @property
    def data_docs(self) -> Path:
        """Data Docs of Great Expectations."""
        return self.state / "data-docs"


RELATIVE = Layout()
