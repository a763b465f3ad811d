"""`pedigree seen`: list the images on which a registered model was trained up to a step."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.core.config import ConfigError
from components.core.references import IMAGE_ID
from components.core.storage import sha256_file
from flows.asked_model import asked_model
from flows.commands.decorators import Answer, command

if TYPE_CHECKING:
    from components.lineage.seen import Training

INCOMPLETE = 1
MAX_SHOWN = 20  # steps of one image


@command(services=True)
def seen(
    reference: Annotated[
        str | None, typer.Argument(metavar="[NAME@ALIAS|NAME/NUMBER]", help="As --model.", show_default=False)
    ] = None,
    step: Annotated[int | None, typer.Option(help="Of its own training; default: the last.")] = None,
    image: Annotated[str | None, typer.Option(metavar="FILE|SHA256", help="Ask for one image.")] = None,
    as_list: Annotated[bool, typer.Option("--list", help="A line for each image: id, draws, weights.")] = False,
    model: Annotated[
        str | None, typer.Option(help="A released model or a candidate; default: the champion of params.yaml's name.")
    ] = None,
) -> Answer:
    """Count the images on which a registered model was trained, or list the steps that drew one image.

    Covers its whole history: a student's teacher, and the initial weights of
    both, to the end of their trainings. Uses no logs: the order is recomputed
    from the weights' configuration and the data version in their `dvc.lock`.
    Counts assume that all images are decodable; for one image the answer is
    exact. Images are compared by their bytes; near copies are offered for a
    file that was not seen.

    Exits with 1 if the history began with foreign weights, whose images are unknown.

    Examples:
      pedigree seen pedigree@champion

      pedigree seen --image photo.jpg

      pedigree seen --model pedigree/3 --step 1000 --image photo.jpg

      pedigree seen pedigree-small-candidates@latest --list > images.tsv
    """
    from components.lineage.seen import read_history

    image_id, root = None if image is None else _image_id(image, as_list), Path.cwd()
    reference = asked_model(reference, model, root)
    history = read_history(reference, root)
    own = history.trainings[0]
    _check_step(step, own)
    steps = [step, *[None] * (len(history.trainings) - 1)]
    problems, exit_code = ([f"incomplete: {history.unknown}"], INCOMPLETE) if history.unknown else ([], 0)
    if as_list:
        return Answer(rows := _rows(history.trainings, steps), partial(_print_list, rows), problems, exit_code)
    answers = [_answer(training, until, image_id) for training, until in zip(history.trainings, steps, strict=True)]
    whole: dict[str, Any] = {"reference": reference, "trainings": answers, "unknown": history.unknown}
    if image_id is not None:
        drawn = any(answer["steps"] for answer in answers)
        whole |= {"image_id": image_id, "model": own.version, "seen": drawn}
        whole["near_copies"] = None if drawn else _near_copies(str(image), own, root)
    return Answer(whole, partial(_print_sentences, whole), problems, exit_code)


def _check_step(step: int | None, own: Training) -> None:
    if step is not None and not 0 <= step <= own.steps:
        raise ConfigError(f"--step {step}: {own.weights} of {own.version} had {own.steps} steps; give 0 to {own.steps}")


def _near_copies(image: str, own: Training, root: Path) -> list[str] | None:
    """Return lines about images that look like a file that was not seen; None for an id.

    Raises:
        ConfigError: the file is not an image.
    """
    from components.curation.near_copies import checked_image, near_copies

    path = Path(image)
    return near_copies(checked_image(path), own.record, root).lines() if path.is_file() else None


def _image_id(image: str, as_list: bool) -> str:
    if as_list:
        raise ConfigError("--image asks for one image and --list for all; give one of them")
    if Path(image).is_file():
        return sha256_file(Path(image))
    if IMAGE_ID.fullmatch(image):
        return image
    raise ConfigError(f"--image {image}: neither a file nor an id; an id is the SHA-256 of an image's bytes, 64 digits")


def _answer(training: Training, step: int | None, image_id: str | None) -> dict[str, Any]:
    from components.lineage.seen import draws_by, steps_with

    facts = {
        "weights": training.weights,
        "version": training.version,
        "relation": training.relation,
        "until_step": training.steps if step is None else step,
        "of_steps": training.steps,
        "dataset_sha256": training.provenance["dataset_sha256"],
    }
    if image_id is not None:
        return facts | {"steps": steps_with(training, image_id, step)}
    draws = draws_by(training, step)
    return facts | {"images": len(draws), "draws": sum(draws.values())}


def _rows(trainings: list[Training], steps: list[int | None]) -> list[dict[str, Any]]:
    from components.lineage.seen import draws_by

    return [
        {"image_id": key, "draws": count, "weights": training.weights}
        for training, step in zip(trainings, steps, strict=True)
        for key, count in draws_by(training, step).items()
    ]


def _print_list(rows: list[dict[str, Any]]) -> None:
    sys.stdout.writelines("\t".join(map(str, row.values())) + "\n" for row in rows)


def _print_sentences(whole: dict[str, Any]) -> None:
    lines = []
    if "image_id" in whole:
        seen_or_not = "seen" if whole["seen"] else "not seen"
        lines += [f"image {whole['image_id']}: {seen_or_not} by {whole['model']}", *(whole["near_copies"] or ())]
    for answer in whole["trainings"]:
        relation = "" if answer["relation"] == "itself" else f"{answer['relation']} "
        start = f"{relation}{answer['weights']} of {answer['version']}, by step {answer['until_step']:,} of "
        start += f"{answer['of_steps']:,}: "
        if "steps" not in answer:
            lines.append(f"{start}{answer['images']:,} images in {answer['draws']:,} draws")
        elif steps := answer["steps"]:
            shown = ", ".join(f"{step:,}" for step in steps[:MAX_SHOWN])
            more = f" and {len(steps) - MAX_SHOWN:,} more" if len(steps) > MAX_SHOWN else ""
            lines.append(f"{start}{len(steps):,} draws, in steps {shown}{more}")
        else:
            lines.append(f"{start}never")
    sys.stdout.write("\n".join(lines) + "\n")
