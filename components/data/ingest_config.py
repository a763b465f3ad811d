"""Parameters of an ingest, validated before anything is read."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from components.core.config import Config, ConfigError, validate
from components.core.errors import PedigreeError
from components.core.layout import RELATIVE
from components.core.text import one_line
from components.data.shards import MAX_PIXELS, PIXEL_CEILING

GIB = 1024**3
MAX_MESSAGE = 2000  # characters of an error


class IngestError(PedigreeError):
    """A source cannot be ingested; one line, with names escaped, says what was found and what is allowed."""

    def __init__(self, message: str):
        super().__init__(one_line(message, MAX_MESSAGE))


def _whole_seconds_utc(when: datetime) -> datetime:
    return (when.replace(tzinfo=UTC) if when.tzinfo is None else when.astimezone(UTC)).replace(microsecond=0)


def _stripped(text: str) -> str:
    if not text.strip():
        raise ValueError("must not be blank")
    return text.strip()


class IngestRequest(Config):
    """One source and its target collection."""

    source: Annotated[
        str, AfterValidator(_stripped)
    ]  # folder, s3://bucket/prefix, .tar or .parquet, or a folder of these
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")  # of the source: small letters, digits and hyphens
    license: Annotated[str, AfterValidator(_stripped)]  # under which the images may be used, such as CC-BY-4.0
    pool: Path = RELATIVE.pool
    evaluation: Path = RELATIVE.evaluation
    holdout: float | None = Field(None, gt=0.0, lt=1.0)  # share of images for the evaluation set, chosen by hash
    as_evaluation: bool = False  # the whole source is an evaluation set
    one_run: bool = False  # only for one run, with exactly the source's present content
    max_pixels: int = Field(MAX_PIXELS, gt=0, le=PIXEL_CEILING)  # of an image; large ones need memory in each stage
    source_version: str | None = None  # None: a digest of all bytes
    ingested_at: Annotated[datetime, AfterValidator(_whole_seconds_utc)] | None = None  # None: now
    shard_bytes: int = Field(GIB, gt=0)
    workers: int | None = Field(None, ge=1)  # processes; None: one per core, or in-process for a small source
    docs_folder: Path = RELATIVE.data_docs

    @classmethod
    def parse(cls, **values: Any) -> IngestRequest:
        """Build a request.

        Raises:
            ConfigError: one line for each value that is missing or not allowed.
        """
        request = validate(cls, values, "ingest")
        if request.as_evaluation and request.holdout is not None:
            raise ConfigError("ingest: holdout is for a pool; as_evaluation already takes the whole source")
        return request
