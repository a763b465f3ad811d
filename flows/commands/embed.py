"""`pedigree embed`: a model's features of the images of a folder."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from flows.commands.decorators import Answer, command
from flows.commands.weights import HELP, METAVAR, named_weights
from flows.console import shown

if TYPE_CHECKING:
    from components.evaluation.folder_features import FolderFeatures


@command(checkout=False)
def embed(
    weights: Annotated[str, typer.Argument(metavar=METAVAR, help=HELP)],
    folder: Annotated[str, typer.Argument(help="Folder of images, of tar shards or of Parquet with image bytes.")],
    out: Annotated[Path, typer.Option(help="Parquet file.")],
    patch_tokens: Annotated[bool, typer.Option("--patch-tokens", help="Add the patch tokens.")] = False,
    resolution: Annotated[int | None, typer.Option(help="Pixels a side of the crop; default: as evaluated.")] = None,
) -> Answer:
    """Write the features of all images of a folder to a Parquet file: those on which the model was evaluated.

    A row an image: `uri`, `image_id`, `width`, `height`, `cls_token`, `feature`
    where the model was not evaluated by its class tokens alone, and with
    `--patch-tokens` also `patch_tokens`; float32, not scaled to unit length.
    Files that are no image for ingest are left out, with counts and examples.
    Run it again after a crash: what was computed is kept beside the output.

    Examples:
      pedigree embed pedigree@champion ~/photos --out features.parquet

      pedigree embed pedigree-small/3 ~/photos --out features.parquet --patch-tokens --resolution 518

      pedigree embed models/adapted ~/photos --out features.parquet --json
    """
    with shown(quiet=False, said_at_end="components.data.ingest"):
        from components.evaluation.folder_features import FeatureRequest, embed_folder

        found = named_weights(weights)
        request = FeatureRequest(found.folder, partial(found.preprocessing_at, resolution), patch_tokens, found.facts)
        done = embed_folder(folder, out, request)
        done = dataclasses.replace(done, notes=(*filter(None, [found.assumed]), *done.notes))
    return Answer({**dataclasses.asdict(done), "weights": found.name}, partial(_show, done, found.name))


def _show(done: FolderFeatures, name: str) -> None:
    console = Console(soft_wrap=True, highlight=False)
    left = ", ".join(f"{reason} {count}" for reason, count in done.left_out.items()) or "none"
    resumed = f", {done.resumed} files computed before" if done.resumed else ""
    console.print(
        f"{done.out}: {done.images} images by {name}; left out: {left}, ignored: {done.ignored}{resumed}", markup=False
    )
    for note in done.notes:
        console.print(f"  {note}", markup=False)
