"""The evaluation sets of a workspace."""

from __future__ import annotations

from pathlib import Path

from components.core.errors import DatasetError
from components.data.evalset import Evalset, read_config, read_evalset
from components.data.evalset_config import EVALSET, EvalsetConfig
from components.data.evaluation_set import labeled_set
from components.data.manifest import read_snapshots, snapshot_manifests


def set_names(root: Path) -> list[str]:
    """Return the names of the evaluation sets below `root` (data/evaluation), sorted."""
    return sorted({path.parent.parent.name for path in snapshot_manifests(root)})


def read_named_set(root: Path, name: str) -> Evalset:
    """Read one of `set_names`; several snapshots of a source, as from later ingests of it, are one set of classes.

    Raises:
        DatasetError: as for `read_evalset`, or a set with `evalset.yaml` has more than one snapshot.
        ConfigError: as for `read_evalset`.
    """
    folder = root / name
    manifests = [path for path in snapshot_manifests(root) if path.parent.parent == folder]
    if len(manifests) == 1:
        return read_evalset(manifests[0].parent)
    if added := [path.parent.name for path in manifests if (path.parent / EVALSET).is_file()]:
        raise DatasetError(
            f"{folder}: {len(manifests)} snapshots, one of them, {added[0]}, a set with {EVALSET}; a set that is "
            "measured has one: move the others away, or add it again with `pedigree evalset add --replace`"
        )
    licenses = sorted({read_config(path.parent).license for path in manifests})
    config = EvalsetConfig(task="classification", license=" AND ".join(licenses))
    images = labeled_set(folder, read_snapshots(folder, manifests))
    return Evalset(folder, config, images, tuple(path.parent for path in manifests))


def read_sets(root: Path) -> list[Evalset]:
    """Read every evaluation set below `root` (data/evaluation), the main one first, the others by name.

    The main set is the first by name of those that measure classes of images with train images of their own, and of
    them one that was ingested with images to train on, before one that was added as a set.

    Raises:
        DatasetError: there is none; or as for `read_named_set`.
        ConfigError: as for `read_evalset`.
    """
    found = [read_named_set(root, name) for name in set_names(root)]
    if not found:
        raise DatasetError(f"{root}: no evaluation images; ingest an evaluation set, or `dvc pull` it")
    main = min(found, key=_order)
    return [main, *(one for one in found if one is not main)]


def _order(one: Evalset) -> tuple[bool, bool, bool, str]:
    special = one.learned is not None or one.clips is not None
    return one.images.labels is None, special, (one.folder / EVALSET).is_file(), one.name
