"""``python -m api models``: list, show, verify, rm and push what is here."""

from __future__ import annotations

import argparse
import sys

from api.cli.download import push_folder
from api.cli.inventory import Entry, choose, inventory
from api.cli.main import FAILED, OK
from api.cli.text import amount, moment, short, table
from api.errors import ApiError
from api.models.description import describe
from api.models.locations import parse_location
from api.models.manifest import examine, list_files, missing_parts
from api.models.records import Records
from api.models.s3_upload import can_upload_folder
from api.settings import Settings

_UNVERIFIED = "its source gave no hashes: compared with what was installed"


def list_models(settings: Settings, args: argparse.Namespace) -> int:
    """What is here, a line each."""
    entries = inventory(settings)
    if args.json:
        _print_json([entry.as_data() for entry in entries])
        return OK
    rows = [("MODEL_ID", "REVISION", "VARIANT", "SIZE", "LAST USED", "VERIFIED", "SOURCE", "KEY")]
    for entry in entries:
        manifest = entry.manifest
        verified = "-" if manifest is None else "yes" if manifest.verified else "no"
        source = manifest.source if manifest else entry.folder.as_posix()
        rows.append(
            (
                entry.title,
                (short(manifest.revision)[:12] if manifest else "") or "-",
                (manifest.variant if manifest else "") or "-",
                amount(entry.bytes),
                moment(entry.last_used),
                verified if entry.whole else "DAMAGED",
                source if entry.place in ("volume", "image") else f"({entry.place}) {source}",
                entry.key or "-",
            )
        )
    print(table(rows))
    return OK


def show(settings: Settings, args: argparse.Namespace) -> int:
    """Everything that is known of one model.

    Raises:
        ApiError: MODEL_NOT_FOUND; INVALID_INPUTS where several are meant.
    """
    entry = choose(inventory(settings), args.model)
    manifest = entry.manifest
    files = manifest.files if manifest else list_files(entry.folder)
    if args.json:
        listed = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in files]
        _print_json({**entry.as_data(), "files": listed})
        return OK
    lines = [("key", entry.key or "- (a folder that was put there by hand)"), ("folder", str(entry.folder))]
    lines += [("asked for", "  ".join(sorted(entry.names)))] if entry.names - {entry.model_id} else []
    if manifest is not None:
        verified = "yes, with hashes of the source" if manifest.verified else "no, the source gave no hashes"
        lines += [
            ("source", manifest.source),
            ("revision", manifest.revision or "-"),
            ("variant", manifest.variant or "-"),
            ("installed", manifest.installed),
            ("last used", moment(entry.last_used)),
            ("verified", verified),
        ]
    try:
        part = manifest.part if manifest else ""
        model = describe(entry.model_id or "?", entry.folder, revision="-", part=part)
        if part:
            lines += [("part", part), ("class", model.class_name or "-")]
        else:
            lines += [("pipeline", model.class_name), ("components", ", ".join(sorted(model.components)))]
    except ApiError as error:
        lines.append(("pipeline", error.message))
    lines.append(("whole", "yes" if entry.whole else "NO: a file is missing, or has another size"))
    lines.append(("files", f"{len(files)}, {amount(entry.bytes)}"))
    print(entry.model_id or entry.key)
    print("\n".join(f"  {name:<12}{value}" for name, value in lines))
    print(table([(f"    {f.path}", amount(f.size), f.sha256 or "-") for f in files]) if files else "")
    return OK


def verify(settings: Settings, args: argparse.Namespace) -> int:
    """Read models from end to end; 1 where one is not what it should be.

    Raises:
        ApiError: as ``show``.
    """
    entries = inventory(settings)
    chosen = [choose(entries, name) for name in args.models] or [entry for entry in entries if entry.key]
    damaged = 0
    for entry in chosen:
        name = f"{entry.model_id}  {entry.key or entry.folder}".strip()
        problems = _problems(entry)
        if problems:
            damaged += 1
            print(f"{name}  DAMAGED")
            print("\n".join(f"  {problem}" for problem in problems))
        elif entry.manifest is None:
            print(f"{name}  nothing to compare it with; every file can be read")
        else:
            print(f"{name}  ok" + ("" if entry.manifest.verified else f" ({_UNVERIFIED})"), flush=True)
    if damaged:
        print(
            f"{damaged} of {len(chosen)} damaged. To have one again: python -m api models rm KEY, then download it.",
            file=sys.stderr,
        )
    return FAILED if damaged else OK


def _problems(entry: Entry) -> list[str]:
    if entry.volume is not None:
        return entry.volume.verify(entry.key)
    return examine(entry.folder, list_files(entry.folder), {}, sync=False)[1] + missing_parts(entry.folder)


def remove(settings: Settings, args: argparse.Namespace) -> int:
    """Remove models from the volume, and what leads to them.

    Raises:
        ApiError: as ``show``; NOT_SUPPORTED for what does not lie on the volume.
        OSError: the volume cannot be written.
    """
    entries = inventory(settings)
    chosen = list({entry.folder: entry for entry in (choose(entries, name) for name in args.models)}.values())
    for entry in chosen:
        if entry.place != "volume":
            why = {"image": "is part of the image", "bundled": "comes with this server"}.get(
                entry.place, f"was put there by hand; delete its folder yourself: {entry.folder}"
            )
            raise ApiError("NOT_SUPPORTED", f"{entry.model_id} {why}. Nothing was removed.")
    if sys.stdin.isatty() and not args.yes:
        for entry in chosen:
            print(f"{entry.model_id}  {entry.key}  {amount(entry.bytes)}")
        if input("Remove? [y/N] ").strip().lower() not in ("y", "yes"):
            print("Nothing was removed.")
            return FAILED
    for entry in chosen:
        assert entry.volume is not None
        entry.volume.remove(entry.key)
        Records(entry.volume.root).forget(entry.key)
        print(f"{entry.model_id}  {entry.key}  removed, {amount(entry.bytes)}", flush=True)
    return OK


def push(settings: Settings, args: argparse.Namespace) -> int:
    """Upload a model to S3.

    Raises:
        ApiError: as ``show``; INVALID_INPUTS for a place where a model cannot be put; what S3 says.
    """
    entry = choose(inventory(settings), args.model)
    location = parse_location(
        args.url,
        default_endpoint=settings.aws_s3_endpoint_url,
        default_bucket=settings.aws_s3_default_bucket,
        model_id=entry.model_id,
        revision=entry.asked_revision,
        field="S3_URL",
    )
    if not can_upload_folder(location):
        message = f"{location} is no place to push to: give an s3:// URL of a folder, or of an archive .tar.zst."
        raise ApiError("INVALID_INPUTS", message, field="S3_URL", requested=args.url)
    push_folder(entry.folder, location, settings)
    print(f"{entry.model_id} is at {location}")
    return OK


def _print_json(data: object) -> None:
    import msgspec

    print(msgspec.json.format(msgspec.json.encode(data), indent=2).decode())
