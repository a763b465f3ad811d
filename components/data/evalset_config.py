"""What an evaluation set is, as its `evalset.yaml` says, and the parameters of adding one. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, FiniteFloat, PositiveInt, model_validator

from components.core.config import Config, validate
from components.core.errors import InputError
from components.core.layout import RELATIVE
from components.data.shards import MAX_PIXELS, PIXEL_CEILING

Task = Literal["classification", "segmentation", "depth", "retrieval", "video"]
Relation = Literal["easy", "hard", "junk"]
# The metric that decides, where a set names none.
METRICS = {
    "classification": "knn_top1",
    "segmentation": "segmentation_miou",
    "depth": "depth_rmse",
    "retrieval": "retrieval_map_medium",
    "video": "linear_top1",
}
EVALSET = "evalset.yaml"  # beside the manifest of a set
MAX_CLASSES = 255  # one index is left for pixels without class
RESERVED = ("image", "image_id")  # no names of group columns


class EvalsetError(InputError):
    """An evaluation set that cannot be used: one line for each fault, with its count and an example."""


def _stripped(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text.strip()


Name = Annotated[str, AfterValidator(_stripped)]
SetName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]  # small letters, digits and hyphens
PixelValue = Annotated[int, Field(ge=0, le=255)]


def _metric_of(values: dict[str, Any]) -> str:
    return METRICS[values["task"]]


class EvalsetConfig(Config):
    """One evaluation set."""

    task: Task
    metric: str = Field(default_factory=_metric_of, pattern=r"^[a-z][a-z0-9_.]*$")  # that decides
    license: Name  # under which images and targets may be used, such as CC-BY-4.0
    resolution: PositiveInt | None = None  # pixels, side of the square a model is given; None: as the run says
    classes: dict[PixelValue, Name] = Field(default_factory=dict)  # segmentation: pixel value -> name
    ignore: PixelValue | None = None  # segmentation: pixel value without class
    depth_range: tuple[FiniteFloat, FiniteFloat] | None = None  # depth, in meters; other pixels are not measured
    groups: tuple[Name, ...] = ()  # columns of groups.parquet, for slices
    clusters: Name | None = None  # one of groups: images of one value are parts of one photograph, for intervals
    clip_features: Literal["mean", "concatenated"] = "mean"  # video: of the frames; the paper: concatenated for SSv2
    train_set: SetName | None = None  # classification: the set whose train images heads are trained on; here are none
    mapping: dict[Name, Name] = Field(default_factory=dict)  # label -> class of train_set, where the names differ

    @model_validator(mode="after")
    def _fields_fit_the_task(self) -> Self:
        segmentation, depth = self.task == "segmentation", self.task == "depth"
        if segmentation != bool(self.classes) or (segmentation and len(self.classes) < 2):
            raise ValueError("classes: two or more pixel values with names for segmentation, none for other tasks")
        if self.ignore is not None and (not segmentation or self.ignore in self.classes):
            raise ValueError("ignore: a pixel value of segmentation masks that is not among classes")
        if len(self.classes) > MAX_CLASSES:
            raise ValueError(f"classes: {MAX_CLASSES} at most")
        if len(set(self.classes.values())) < len(self.classes):
            raise ValueError("classes: two pixel values have the same name")
        if depth != (self.depth_range is not None):
            raise ValueError("depth_range: [nearest, farthest] in meters for depth, none for other tasks")
        if self.depth_range is not None and not 0 < self.depth_range[0] < self.depth_range[1]:
            raise ValueError("depth_range: [nearest, farthest] in meters, 0 < nearest < farthest")
        if len(set(self.groups)) < len(self.groups) or set(self.groups) & set(RESERVED):
            raise ValueError(f"groups: different names, none of {', '.join(RESERVED)}")
        if self.clusters is not None and (self.clusters not in self.groups or self.task == "retrieval"):
            raise ValueError("clusters: one of groups; none for retrieval, whose values are those of queries")
        return self

    @model_validator(mode="after")
    def _video_and_other_set_fit_the_task(self) -> Self:
        if self.task == "video" and self.groups:
            raise ValueError("groups: none for video, whose values are those of clips")
        if self.task != "video" and self.clip_features != "mean":
            raise ValueError("clip_features: for video only")
        if self.train_set is not None and self.task != "classification":
            raise ValueError("train_set: a set of classification, for sets of classification only")
        if self.mapping and self.train_set is None:
            raise ValueError("mapping: names of classes of train_set, so only with it")
        return self

    def mapped(self, label: str) -> str:
        """Return the class of `train_set` that a label of this set stands for."""
        return self.mapping.get(label, label)

    def to_yaml(self) -> str:
        """Return the text of `evalset.yaml`; equal sets give equal text."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class EvalsetRequest(Config):
    """A folder of a user, and where its set goes."""

    source: Path  # with evalset.yaml, images/ and what the task needs
    name: SetName
    license: Name | None = None  # None: that of evalset.yaml
    replace: bool = False  # take the place of other versions of the set
    evaluation: Path = RELATIVE.evaluation
    max_pixels: int = Field(MAX_PIXELS, gt=0, le=PIXEL_CEILING)  # of an image, and so of its target
    docs_folder: Path = RELATIVE.data_docs

    @classmethod
    def parse(cls, **values: Any) -> EvalsetRequest:
        """Build a request.

        Raises:
            ConfigError: one line for each value that is missing or not allowed.
        """
        return validate(cls, values, "evalset")
