"""Parameters of the stages `embed` and `curate`; METHOD names refer to the DINOv2 paper (arXiv 2304.07193)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from components.core.config import Config

Similarity = Annotated[float, Field(gt=0, lt=1)]  # cosine of two embeddings


class DescriptorConfig(Config):
    """The built-in copy-detection descriptor: deterministic, no training, no weights."""

    kind: Literal["descriptor"] = "descriptor"


class ModelConfig(Config):
    """Class tokens of weights of our own."""

    kind: Literal["model"] = "model"
    weights: str  # a weights folder, or models:/NAME@alias
    image_size: PositiveInt = 224  # whole image squeezed to this square, a multiple of the patch size
    batch_size: PositiveInt = 32


class TorchScriptConfig(Config):
    """A TorchScript file such as SSCD's. It is a program: load only files whose origin you trust."""

    kind: Literal["torchscript"] = "torchscript"
    path: str
    resize: Literal["square", "short_side"] = "square"  # SSCD: 320 square (skewed), or short side 288
    size: PositiveInt = 320
    batch_size: PositiveInt = 32  # "short_side" runs images one by one, because their shapes differ


class OnnxConfig(Config):
    """An ONNX file with one image input [B, 3, H, W] and the embeddings [B, D] as first output."""

    kind: Literal["onnx"] = "onnx"
    path: str
    resize: Literal["square", "short_side"] = "square"
    size: PositiveInt = 320
    batch_size: PositiveInt = 32


EmbedderConfig = Annotated[DescriptorConfig | ModelConfig | TorchScriptConfig | OnnxConfig, Field(discriminator="kind")]


class EmbedConfig(Config):
    """Stage `embed`."""

    embedder: EmbedderConfig = DescriptorConfig()
    workers: PositiveInt | None = None  # processes; None: one for each CPU


class FilterConfig(Config):
    """What an image must be before anything else is asked."""

    min_side: PositiveInt = 16  # pixels, of the shorter side
    max_aspect_ratio: Annotated[float, Field(ge=1)] | None = 8.0  # longer side / shorter side; None: any


class IndexConfig(Config):
    """How nearest neighbours are searched: exactly in small sets, else by an inverted file of coded vectors."""

    flat_below: Annotated[int, Field(ge=256)] = 100_000  # vectors; fewer are searched exactly
    num_lists: PositiveInt | None = None  # cells of the inverted file; None: twice the square root of the vectors
    num_probes: PositiveInt = 128  # cells searched for each query
    code_bytes: PositiveInt = 64  # of each vector in memory, at most
    recall_sample: PositiveInt = 1000  # queries that are also searched exactly
    min_recall: Annotated[float, Field(ge=0, le=1)] = 0.9  # of the exact pairs; the run fails below
    memory_mib: PositiveInt = 1024  # of the vectors that the index is trained on


class CurateConfig(Config):
    """Stage `curate`."""

    filters: FilterConfig = FilterConfig()
    num_neighbors: PositiveInt = 64  # per image in the duplicate graph, section 3
    dedup_similarity: Similarity = 0.6  # edges above this join duplicates, appendix A.3
    decontamination_similarity: Similarity = 0.45  # to any evaluation image, appendix A.3
    num_clusters: PositiveInt  # of the deduplicated images; at most one an image
    kmeans_iterations: PositiveInt = 50  # arXiv 2405.15613, released code
    target_images: PositiveInt | None = None  # balanced over the clusters; None: keep all
    max_shard_mib: PositiveInt = 1024
