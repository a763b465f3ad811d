"""Parameters of the stages `embed` and `curate`; METHOD names refer to the DINOv2 paper (arXiv 2304.07193)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from components.core.config import Config
from components.core.errors import PedigreeError
from components.model.config import Preprocessing

Similarity = Annotated[float, Field(gt=0, lt=1)]  # cosine of two embeddings
Share = Annotated[float, Field(ge=0, le=1)]
Channels = tuple[float, float, float]
ImageFormat = Literal["JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM"]
Domain = Annotated[str, Field(pattern=r"^[^\s/:*@]+$")]  # such as example.com


class CurationError(PedigreeError):
    """Curation cannot use images, embeddings or models; the message says which, and what to change."""


class DescriptorConfig(Config):
    """The built-in copy-detection descriptor: deterministic, no training, no weights."""

    kind: Literal["descriptor"] = "descriptor"


class ModelConfig(Config):
    """Features of a Pedigree model: class tokens, or as `preprocessing.pooling` says."""

    kind: Literal["model"] = "model"
    weights: str  # a weights folder, or models:/NAME@alias
    preprocessing: Preprocessing = Preprocessing()  # crop_size: a multiple of the patch size
    batch_size: PositiveInt = 32


class TorchScriptConfig(Config):
    """A TorchScript file such as SSCD's. Loading it executes code: use only trusted files."""

    kind: Literal["torchscript"] = "torchscript"
    path: str
    resize: Literal["square", "short_side"] = "square"  # SSCD: 320 square (skewed), or short side 288
    size: PositiveInt = 320
    batch_size: PositiveInt = 32  # "short_side" uses batches of 1, because shapes differ


class OnnxConfig(Config):
    """An ONNX file with one image input [B, 3, H, W] and embeddings [B, D] as the first output."""

    kind: Literal["onnx"] = "onnx"
    path: str
    resize: Literal["square", "short_side"] = "square"
    size: PositiveInt = 320
    batch_size: PositiveInt = 32


EmbedderConfig = Annotated[DescriptorConfig | ModelConfig | TorchScriptConfig | OnnxConfig, Field(discriminator="kind")]


class OpenNsfwConfig(Config):
    """Yahoo's OpenNSFW classifier, from the extra `safety`."""

    kind: Literal["opennsfw"] = "opennsfw"


class NsfwOnnxConfig(Config):
    """An ONNX classifier: one square RGB image in, class scores [1, C] out."""

    kind: Literal["onnx"] = "onnx"
    path: str
    size: PositiveInt = 224  # the image is resized to this square
    layout: Literal["nchw", "nhwc"] = "nchw"
    mean: Channels = (0.5, 0.5, 0.5)  # of RGB in [0, 1]
    std: Channels = (0.5, 0.5, 0.5)
    output_index: NonNegativeInt = 1  # index of the class "not safe for work"
    logits: bool = False  # True: the outputs still need a softmax


class CascadeConfig(Config):
    """scikit-image's frontal-face cascade."""

    kind: Literal["cascade"] = "cascade"
    working_side: PositiveInt = 256  # larger images are downscaled to it; the smallest face has 24 pixels
    min_neighbors: PositiveInt = 3  # overlapping detections required; lower: higher recall, lower precision


class FaceOnnxConfig(Config):
    """An ONNX detector: [1, 3, S, S] RGB in [0, 1] in; faces [M, 5] of x1, y1, x2, y2, score in those S pixels out.

    The image is resized to the square with its aspect ratio, at the top left; the rest is black.
    """

    kind: Literal["onnx"] = "onnx"
    path: str
    size: PositiveInt = 640
    min_score: Annotated[float, Field(ge=0, le=1)] = 0.5


NsfwConfig = Annotated[OpenNsfwConfig | NsfwOnnxConfig, Field(discriminator="kind")]
FacesConfig = Annotated[CascadeConfig | FaceOnnxConfig, Field(discriminator="kind")]


class ScoresConfig(Config):
    """Scores computed from pixels, in addition to gray share and entropy."""

    nsfw: NsfwConfig | None = None  # None: not computed
    faces: FacesConfig | None = None


class EmbedConfig(Config):
    """Stage `embed`."""

    embedder: EmbedderConfig = DescriptorConfig()  # for copies
    semantic: EmbedderConfig | None = None  # for clustering and retrieval; None: the same as `embedder`
    scores: ScoresConfig = ScoresConfig()
    workers: PositiveInt | None = None  # processes; None: one for each CPU


class FilterConfig(Config):
    """The first step of curation; changed thresholds do not require new scores."""

    min_side: PositiveInt = 16  # pixels, of the shorter side
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = 8.0  # longer side / shorter side; None: any
    formats: Annotated[tuple[ImageFormat, ...], Field(min_length=1)] | None = None  # None: any
    blocked_domains: tuple[Domain, ...] = ()  # URI hosts or first folders of a source, including subdomains
    blocked_paths: tuple[str, ...] = ()  # globs over the URI; * also matches /
    blocked_licenses: tuple[str, ...] = ()  # as in the manifest, case-insensitive
    allowed_licenses: Annotated[tuple[str, ...], Field(min_length=1)] | None = None  # None: any
    max_gray_share: Share | None = None  # of the pixels; 0.99 rejects gray photographs
    min_entropy: Annotated[float, Field(ge=0, le=8)] | None = None  # bits; blank images are below 1
    max_nsfw: Share | None = None  # needs embed.scores.nsfw


class IndexConfig(Config):
    """Nearest-neighbor search: exact in small sets, else by an inverted file with product quantization."""

    flat_below: Annotated[int, Field(ge=256)] = 100_000  # vectors; fewer are searched exactly
    num_lists: PositiveInt | None = None  # cells of the inverted file; None: twice the square root of the vectors
    num_probes: PositiveInt = 128  # cells searched for each query
    code_bytes: PositiveInt = 64  # maximum per vector in memory
    recall_sample: PositiveInt = 1000  # queries that are also searched exactly
    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.9  # of the exact pairs; a lower recall fails the run
    memory_mib: PositiveInt = 1024  # of the index's training vectors


class LevelConfig(Config):
    """One level of hierarchical k-means (arXiv 2405.15613, section 3)."""

    num_clusters: PositiveInt  # at most the number of points
    resampling_steps: NonNegativeInt = 10  # released code; 0 is plain k-means
    sample_size: PositiveInt | None = None  # resampled points per cluster; None: half the mean cluster size


class SeedSetConfig(Config):
    """Use of a source of the pool as a seed set, DINOv2's appendix A.4."""

    as_is: bool = False  # include its images
    retrieve: Literal["sample", "cluster"] | None = None  # include images similar to its own
    k: PositiveInt = 4  # "sample": nearest images of each seed; 32 for ImageNet-1k
    min_seeds: PositiveInt = 4  # "cluster": required in a cluster to retrieve from it
    per_cluster: PositiveInt = 10_000  # "cluster": maximum images per cluster
    cap: PositiveInt = 1_000_000  # "cluster": maximum images in total

    @model_validator(mode="after")
    def _says_what_is_read(self) -> SeedSetConfig:
        if not self.as_is and self.retrieve is None:
            raise ValueError("give as_is: true, retrieve: sample or retrieve: cluster, else the seed set does nothing")
        read = {"sample": {"k"}, "cluster": {"min_seeds", "per_cluster", "cap"}}.get(self.retrieve or "", set())
        for name in {"k", "min_seeds", "per_cluster", "cap"} - read:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is not read where retrieve is {self.retrieve or 'not given'}")
        return self


class GatesConfig(Config):
    """Further conditions on a curated set; see components/curation/gates.py."""

    max_cluster_share: Share | None = None  # of the balanced sample in one top cluster; None: as before sampling
    max_source_shift: Share = 0.25  # change of any source's share since the previous set
    size_ratio: tuple[PositiveFloat, PositiveFloat] = (0.5, 10.0)  # bounds of the size relative to the previous set
    previous: str | None = None  # manifest.parquet of the previous set; None: last one of these settings and sources

    @model_validator(mode="after")
    def _range(self) -> GatesConfig:
        least, most = self.size_ratio
        if least > most:
            raise ValueError(f"size_ratio is {least} to {most}; allowed: from <= to")
        return self


class CurateConfig(Config):
    """Stage `curate`."""

    filters: FilterConfig = FilterConfig()
    num_neighbors: PositiveInt = 64  # of each image in the duplicate graph, section 3
    dedup_similarity: Similarity = 0.6  # edges above this join duplicates, appendix A.3
    decontamination_similarity: Similarity = 0.45  # to any evaluation image, appendix A.3
    index: IndexConfig = IndexConfig()
    seed_sets: dict[str, SeedSetConfig] = Field(default_factory=dict)  # by source of the pool; appendix A.4
    # From the finest clusters up, where `needs_clusters`.
    levels: list[LevelConfig] = Field(default_factory=list[LevelConfig])
    kmeans_iterations: PositiveInt = 50  # arXiv 2405.15613, released code
    target_images: NonNegativeInt | None = None  # of the balanced part; 0: there is none; None: all
    gates: GatesConfig = GatesConfig()
    max_shard_mib: PositiveInt = 1024
    workers: PositiveInt | None = None  # packing processes; None: one for each CPU

    @property
    def needs_clusters(self) -> bool:
        """Whether the balanced part or a seed set needs clusters."""
        return self.target_images != 0 or any(one.retrieve == "cluster" for one in self.seed_sets.values())

    @model_validator(mode="after")
    def _brings_something_in(self) -> CurateConfig:
        if self.target_images == 0 and not self.seed_sets:
            raise ValueError("target_images is 0 and there are no seed_sets, so no image is in; give one of the two")
        if self.needs_clusters and not self.levels:
            raise ValueError("levels is empty, but the balanced part and retrieve: cluster need at least one level")
        return self
