"""Summary of training content in the parts of the EU template of Article 53(1)(d) AI Act (C(2025) 8311), as Markdown.

Whether a model falls under that duty is for a person to decide, and so is all that no record of a run can know.
"""

from __future__ import annotations

from collections.abc import Iterable

from components.registry.documents.graph import LOCAL, Data, Graph

PERSON = "**[a person fills this in]**"
SIZES = ((1_000_000, "less than 1 million images"), (1_000_000_000, "1 million to 1 billion images"))
LARGEST = "more than 1 billion images"


def training_content(graph: Graph) -> str:
    """Return the summary; what only a person can state is marked by `PERSON`."""
    lines = [
        f"# Public summary of training content: {graph.name}",
        f"In the parts of the template of Article 53(1)(d) of Regulation (EU) 2024/1689. Made from the record of run "
        f"{graph.making.run}. Places marked {PERSON} are not in that record.",
        *_general(graph),
        *_sources(graph),
        *_processing(graph),
    ]
    return "\n\n".join(lines) + "\n"


def _general(graph: Graph) -> list[str]:
    dates = sorted(data.ingested[:10] for data in graph.pool if data.ingested)
    count = graph.curated.num_images
    size = next((told for limit, told in SIZES if count < limit), LARGEST)
    return [
        "## 1. General information",
        "### 1.1 Provider",
        _bullets([f"Name and contact: {PERSON}", f"Authorised representative in the Union: {PERSON}"]),
        "### 1.2 Model",
        _bullets(
            [
                f"Versioned model name: {graph.name}, run {graph.making.run}, weights SHA-256 "
                f"`{graph.making.origin.weights_sha256}`",
                f"Model dependencies: `{graph.parent[0]}`, SHA-256 `{graph.parent[1]}`",
                f"Date of placement on the Union market: {PERSON}",
            ]
        ),
        "### 1.3 Modalities, size and other characteristics",
        _bullets(
            [
                "Modalities: images. No text, audio or video.",
                f"Training data size: {size} ({count:,} images in training, of {_total(graph.pool):,} collected)",
                f"Types of content: {PERSON}",
                f"Latest date of acquisition: {dates[-1] if dates else PERSON}; no learning after training",
                "Languages: none, images only",
                f"Other characteristics, such as regions and groups of people: {PERSON}",
            ]
        ),
    ]


def _sources(graph: Graph) -> list[str]:
    rows = [f"| {source} | {license_} | {count:,} |" for source, license_, count in graph.curated.images]
    collected = [f"`{data.path}`: {_origin(data)}" for data in graph.pool]
    kinds = {
        "2.1 Publicly available datasets": f"Which of the sources above are public datasets, with links: {PERSON}",
        "2.2 Private datasets of third parties": f"Licensed by rightsholders, or obtained from others: {PERSON}",
        "2.3 Data crawled and scraped from online sources": "Pedigree has no crawler. Whether a source was crawled "
        f"before, by which crawler, when and from which domains: {PERSON}",
        "2.4 User data": f"Whether a source holds data of users of the provider's services: {PERSON}",
        "2.5 Synthetic data": f"Pedigree made no synthetic images. Whether a source holds some: {PERSON}",
        "2.6 Other sources": f"{PERSON}",
    }
    return [
        "## 2. List of data sources",
        "\n".join(["| source | license | images in training |", "|---|---|---|", *rows]),
        "Collected from:",
        _bullets(collected),
        *(part for title, text in kinds.items() for part in (f"### {title}", text)),
    ]


def _processing(graph: Graph) -> list[str]:
    rejected = sorted(graph.making.curation.rejected.items())
    removed = "; ".join(f"{reason}: {count:,} images" for reason, count in rejected) or "no image, or not recorded"
    return [
        "## 3. Data processing",
        "### 3.1 Respect of reservations of rights",
        f"The license of each image is recorded; see part 2. Measures against use of reserved works: {PERSON}",
        "### 3.2 Removal of illegal content",
        f"Curation left out, by reason: {removed}. Measures against illegal content: {PERSON}",
        "### 3.3 Other information",
        f"Steps: {', '.join(step.name for step in graph.steps)}. Code: git commit `{graph.making.origin.commit}`. "
        f"The training set with the hash of each file: `croissant.json` beside this summary. Anything else: {PERSON}",
    ]


def _origin(data: Data) -> str:
    if data.address is None:
        return f"from where was not recorded; {PERSON}"
    where = f"files of the provider; {PERSON}" if data.address.startswith(LOCAL) else data.address
    return f"{where}, taken in on {(data.ingested or '')[:10] or PERSON}"


def _total(pool: Iterable[Data]) -> int:
    return sum(data.num_images for data in pool)


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
