"""`pedigree takedown`: withdraw images, and what was made from them."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from components.core.config import ConfigError
from components.core.layout import RELATIVE
from components.core.locks import exclusive
from components.core.references import IMAGE_ID
from components.core.text import one_line, some_of
from components.core.user import ADMIN
from flows.commands.decorators import Answer, answer_console, command
from flows.git import head_commit

if TYPE_CHECKING:
    from components.lineage.impact import Impact
    from components.lineage.takedown import Takedown
    from components.lineage.where_used import Query
    from flows.takedown import Done

log = logging.getLogger(__name__)

SHOWN = 5  # names of one kind
WEIGHTS_KEEP = "weights keep what they learned: versions are flagged and their promotion is blocked, none is deleted"


@command(services=True, role=ADMIN)
def takedown(  # noqa: PLR0913, PLR0917 - the options of a command
    image: Annotated[list[str] | None, typer.Option(help="An image file or image id; can be repeated.")] = None,
    source: Annotated[str | None, typer.Option(help="All images of this source.")] = None,
    license_: Annotated[str | None, typer.Option("--license", "--licence", help="All images under it.")] = None,
    file: Annotated[Path | None, typer.Option(help="CSV with a column `image` of files or image ids.")] = None,
    reason: Annotated[str, typer.Option(help="Why; it goes into git and the audit log.")] = "",
    near_copies: Annotated[bool, typer.Option("--near-copies", help="Later ingests refuse near copies too.")] = False,
    purge: Annotated[bool, typer.Option("--purge", help="Remove the bytes everywhere, and prove it.")] = False,
    retrain: Annotated[bool, typer.Option(help="Start a retraining without the images.")] = True,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> Answer:
    """Withdraw images: make data versions without them, refuse them from now on, flag the models that learned them.

    Shows first what is concerned, and asks. Then: an audit event; a tombstone
    in git (hashes and the reason, never the image); new pool and evaluation
    versions without the images, committed to the branch; a tag on each model
    that may have learned them, whose gate `takedown` fails from then on; a
    retraining. Weights keep what they learned. A takedown that was cut short
    is finished by the next one, also by `pedigree takedown` without options.

    --purge removes the shards, embeddings, pictures, checkpoints and caches
    that hold or show the images from S3 (all object versions), DVC's cache,
    worktrees, MLflow and Prefect, then searches all bytes; exits with 1 if any
    are left. Old data versions cannot be pulled whole any more.

    Examples:
      pedigree takedown --image photo.jpg --reason "consent withdrawn"

      pedigree takedown --source crawl --reason "license revoked" --purge

      pedigree takedown --file ids.csv --reason "court order 7" --near-copies --yes --json
    """
    root = Path.cwd()
    head_commit(root)
    with exclusive(root / RELATIVE.state / "takedown.lock", lambda _: log.info("waiting for another takedown")):
        given = {"--image": image, "--source": source, "--license": license_, "--file": file}
        asked = [name for name, value in given.items() if value]
        earlier = _finish_earlier(root)
        if not asked and earlier:
            return _answer({}, earlier, earlier)
        if len(asked) != 1 or not reason.strip():
            raise ConfigError(f"give one of {', '.join(given)}, and --reason TEXT; given: {', '.join(asked) or 'none'}")
        query, pictures = _query(image, source, license_, file)
        impact = _assess(root, query)
        _confirm(impact, str(query), purge, yes)
        intent = _intent(root, impact, pictures, str(query), reason.strip(), near_copies)
        intent = intent.model_copy(update={"purge": purge, "retrain": retrain})
        intent.save(root)
        done = _carry_out(root, intent)
        return _answer({"impact": dataclasses.asdict(impact), **_as_dict(done)}, earlier, [*earlier, done])


def _assess(root: Path, query: Query) -> Impact:
    from components.lineage.impact import assess

    _bring_data(root)
    return assess(root, query)


def _query(
    image: Sequence[str] | None, source: str | None, license_: str | None, file: Path | None
) -> tuple[Query, dict[str, bytes]]:
    """Return what is searched, and the bytes of images given as files, by id."""
    from components.lineage.where_used import Query

    if source or license_:
        return Query(source=source, license=license_), {}
    ids: set[str] = set()
    pictures: dict[str, bytes] = {}
    for given, where in [(text, "--image") for text in image or ()] or _listed(file or Path()):
        if IMAGE_ID.fullmatch(given):
            ids.add(given)
        else:
            data = _image_bytes(given, where)
            pictures[hashlib.sha256(data).hexdigest()] = data
    return Query(images=frozenset(ids | pictures.keys())), pictures


def _listed(file: Path) -> list[tuple[str, str]]:
    """Return the images that a CSV file lists, each with its place."""
    try:
        rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8-sig"))))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"--file {file}: not a readable CSV file ({error})") from None
    if not rows or "image" not in rows[0]:
        raise ConfigError(f"--file {file}: no rows below a header with the column `image` (image files or image ids)")
    return [(row["image"].strip(), f"{file}, row {number}") for number, row in enumerate(rows, start=2)]


def _image_bytes(path: str, where: str) -> bytes:
    from components.data.shards import ImageError, decode_image

    try:
        data = Path(path).read_bytes()
        decode_image(data)
    except OSError as error:
        known = "expected an image file, or an image id of 64 hexadecimal digits"
        raise ConfigError(f"{where} {one_line(path)}: {error.strerror or error}; {known}") from None
    except ImageError as error:
        raise ConfigError(f"{where} {one_line(path)}: not an image: {error}") from None
    return data


def _bring_data(root: Path) -> None:
    """Fetch the data of the checkout's snapshots if any of it is not here, because it is searched and rebuilt."""
    from components.lineage.ledger import Ledger
    from components.lineage.takedown import dvc_ids

    if not all((root / path).is_dir() for path in dvc_ids(root)):
        Ledger(root).bring_data()


def _confirm(impact: Impact, asked: str, purge: bool, yes: bool) -> None:
    """Show the impact, and ask; a person types the number of images."""
    if yes:
        return
    if not sys.stdin.isatty():
        raise ConfigError("no terminal to ask on: look at it there first, or give --yes")
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    for line in _impact_lines(impact, asked, purge):
        console.print(line, markup=False)
    typed = typer.prompt(f"type the number of images, {len(impact.images)}, to withdraw them", err=True)
    if typed.strip().replace(",", "") != str(len(impact.images)):
        raise ConfigError(f"{one_line(typed)!r} is not {len(impact.images)}: nothing was changed")


def _intent(
    root: Path, impact: Impact, pictures: Mapping[str, bytes], asked: str, reason: str, near_copies: bool
) -> Takedown:
    from components.lineage.residue import needle
    from components.lineage.takedown import Takedown, takedown_id
    from components.registry.promote import who

    by = who(None)
    signs = _fingerprints(root, impact, pictures) if near_copies else ()
    return Takedown(
        id=takedown_id(impact.images, reason),
        reason=reason,
        asked=asked,
        at=datetime.now(UTC).replace(microsecond=0),
        by=by["actor"],
        actor_from=by["actor_from"],
        images=impact.images,
        fingerprints=tuple(sorted(set(signs))),
        models=dict(impact.learned),
        snapshots=dict.fromkeys(impact.snapshots, ""),
        near_copies=near_copies,
        search=tuple(sorted(needle(data).hex() for data in pictures.values())),
    )


def _fingerprints(root: Path, impact: Impact, pictures: Mapping[str, bytes]) -> Iterable[str]:
    """Return the fingerprints of the images, as far as their bytes are at hand and have structure."""
    from components.data.shards import decode_image
    from components.data.tombstones import fingerprint
    from components.lineage.takedown import image_bytes

    found = dict(pictures)
    for snapshot in impact.snapshots:
        found |= image_bytes(root / snapshot, impact.images)
    signs = [sign for data in found.values() if (sign := fingerprint(decode_image(data)))]
    if lacking := len(impact.images) - len(signs):
        log.warning("near copies of %d images cannot be told: their bytes are not here, or have no structure", lacking)
    return signs


def _finish_earlier(root: Path) -> list[Done]:
    from components.lineage.takedown import unfinished

    return [_carry_out(root, intent) for intent in unfinished(root)]


def _carry_out(root: Path, intent: Takedown) -> Done:
    from flows.takedown import carry_out

    return carry_out(root, intent)


def _answer(data: dict[str, Any], earlier: Sequence[Done], all_done: Sequence[Done]) -> Answer:
    remains = any(done.purged and done.purged.left for done in all_done)
    data = {**data, "finished": [_as_dict(done) for done in earlier]}
    return Answer(data, partial(_show_all, all_done), exit_code=int(remains))


def _as_dict(done: Done) -> dict[str, Any]:
    intent = done.takedown.model_dump(mode="json", exclude={"search", "fingerprints"})
    return {**intent, "commit": done.commit, "retraining": done.retraining, "notes": done.notes,
            "purged": dataclasses.asdict(done.purged) if done.purged else None}  # fmt: skip


def _impact_lines(impact: Impact, asked: str, purge: bool) -> list[str]:
    """What a takedown would concern."""
    sources = ", ".join(f"{name} {count:,}" for name, count in impact.sources.items()) or "none"
    lines = [f"{asked}: {len(impact.images):,} images; by source: {sources}"]
    if impact.nowhere:
        lines.append(f"{impact.nowhere:,} of them are in no data version; later ingests refuse them")
    lines += [
        f"snapshots of the checkout to replace: {_counted(impact.snapshots)}",
        f"data versions in any history: {_counted({f'{path} ({id_[:12]})': n for path, id_, n in impact.versions})}",
        f"runs: {len(impact.runs)}{_such(impact.runs)}",
        f"models that may have learned them: {len(impact.learned)}",
        *(f"  {_named(impact, name)}: {why}" for name, why in impact.learned.items()),
    ]
    if impact.beside:
        lines.append(f"models with them in the pool or evaluation set only: {len(impact.beside)}, not flagged"
                     f"{_such(sorted(impact.beside))}")  # fmt: skip
    lines += [f"not searched: {line}" for line in impact.unknown]
    if not purge:
        lines.append("the bytes stay in old data versions; --purge removes them")
    else:
        lines.append("the purge removes whole shards of old data versions, and pictures of runs that used them")
    return [*lines, WEIGHTS_KEEP]


def _named(impact: Impact, name: str) -> str:
    aliases = impact.aliases.get(name)
    return f"{name} ({', '.join(aliases)})" if aliases else name


def _counted(found: Mapping[str, int]) -> str:
    if not found:
        return "none"
    return f"{len(found)}, such as {some_of([f'{name}: {n:,} images' for name, n in found.items()], SHOWN)}"


def _such(names: Sequence[str]) -> str:
    return f", such as {some_of(names, SHOWN)}" if names else ""


def _show_all(all_done: Sequence[Done]) -> None:
    console = answer_console()
    for done in all_done:
        for line in _lines(done):
            console.print(line, markup=False)


def _lines(done: Done) -> list[str]:
    intent = done.takedown
    lines = [f"{intent.id}: {len(intent.images):,} images ({intent.asked}) are withdrawn: {intent.reason}"]
    for old, new in intent.snapshots.items():
        lines.append(f"  {old} is now {new}" if new else f"  {old} is gone: no image of it is left")
    lines.append(f"  commit {done.commit[:12]}; later ingests refuse the images"
                 f"{' and near copies' if intent.fingerprints else ''}")  # fmt: skip
    lines += [f"  flagged: {name} ({why}); its gate `takedown` fails" for name, why in intent.models.items()]
    lines += [f"  {WEIGHTS_KEEP}"] if intent.models else []
    lines += [f"  {line}" for line in [*done.notes, done.retraining]]
    return lines + ([f"  {line}" for line in done.purged.lines()] if done.purged else [])
