"""`pedigree export`: weights in a form that other programs read."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console

from flows.commands.decorators import Answer, command
from flows.commands.weights import HELP, METAVAR, named_weights

if TYPE_CHECKING:
    from components.registry.exports import Export

# As `components.registry.exports.Format`, which loads torch.
Form = Literal["safetensors", "dinov2", "timm", "transformers", "onnx", "torch-export"]


@command(checkout=False)
def export(
    weights: Annotated[str, typer.Argument(metavar=METAVAR, help=HELP)],
    form: Annotated[Form, typer.Option("--format", help="Who shall read it.")],
    out: Annotated[Path | None, typer.Option(help="File or folder; default: named after weights and format.")] = None,
    resolution: Annotated[int | None, typer.Option(help="Pixels a side of its images; default: as evaluated.")] = None,
) -> Answer:
    """Write a model's weights in a form that other programs read, once its tokens are found to be ours.

    The file is written aside, read back and run on photographs beside the
    original: below a cosine of 0.9999 it is refused. Positions are resampled
    to `--resolution` here, so export again for another one; safetensors and
    dinov2 keep the trained grid by default. Digest and passport are inside.
    dinov2 is a .pth of tensors alone, as DINOv2's own code reads it.

    Examples:
      pedigree export pedigree@champion --format onnx

      pedigree export pedigree/3 --format transformers --resolution 518 --out dinov2-ours

      pedigree export models/adapted --format timm --json
    """
    from components.registry import exports

    found = named_weights(weights)
    done = exports.export(found, form, out, resolution)
    data = {**dataclasses.asdict(done), "format": form, "assumed": found.assumed or None}
    return Answer(data, partial(_show, done, form, found.assumed))


def _show(done: Export, form: str, assumed: str) -> None:
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"[bold green]{form}[/] ", end="")
    console.print(str(done.path), markup=False)
    left = f" (left out: {', '.join(done.left_out)}, which only training uses)" if done.left_out else ""
    rows = {
        "for": f"images of {done.resolution} x {done.resolution} pixels",
        "tensors": f"{done.num_tensors}{left}",
        "checked": f"read back, on {done.num_images} photographs: cosine at least {done.least_cosine:.7f}, "
        f"values at most {done.largest_difference:.1e} apart",
        "load": done.usage,
        **({"assumed": assumed} if assumed else {}),
    }
    for label, line in rows.items():
        console.print(f"  {label:<9}{line}", markup=False)
