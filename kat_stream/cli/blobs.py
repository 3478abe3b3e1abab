"""`kat-stream blobs`: the large values that lie beside the log."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_group, add_run_option, duration, table

if TYPE_CHECKING:
    from kat_stream.log.sweeper import Survey

ABOUT = (
    "A value over blobs.limit_bytes is put into a store (blobs.url: file:DIRECTORY or s3://BUCKET/PREFIX; by default "
    "the run's folder), named by its hash; the log holds a reference."
)


def register(subparsers: Any) -> None:
    group = add_group(subparsers, "blobs", help="large values that lie beside the log", description=ABOUT)
    list_parser = add_command(
        group,
        "list",
        list_,
        help="every blob, its size and age, and whether anything refers to it",
        description="Reads the run's topics and archive to see what refers to each blob.",
        examples=["blobs list", "blobs list --run runs/mine"],
    )
    sweep_parser = add_command(
        group,
        "sweep",
        sweep,
        help="remove blobs that nothing refers to",
        description="Removes blobs older than the grace period that no message on any topic and no archived message "
        "refers to. Before it removes any it waits a minute and reads what came meanwhile: whatever the clocks say, "
        "nothing goes whose record is on its way. A store serves one log: references on another log are not seen. A "
        "run on the in-memory log must have ended.",
        examples=["blobs sweep --dry-run", "blobs sweep --run runs/mine --grace 7d"],
    )
    sweep_parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    for parser in (list_parser, sweep_parser):
        grace = "leave what is younger than this: 90m, 24h, 7d (default: 24h)"
        parser.add_argument("--grace", type=duration, default="24h", metavar="TIME", help=grace)
        add_run_option(parser)


def list_(args: argparse.Namespace) -> int:
    import time

    found, _ = _run(args, remove=False)
    rows = [("BLOB", "BYTES", "HOURS", "REFERRED TO")]
    garbage = {blob.sha256 for blob in found.garbage}
    for blob in found.blobs:
        said = "yes" if blob.sha256 in found.named else "no" if blob.sha256 in garbage else "no, but young"
        rows.append((blob.sha256, str(blob.size), f"{(time.time() - blob.modified_unix_s) / 3600:.1f}", said))
    print(table(rows) if found.blobs else "no blobs")
    return 0


def sweep(args: argparse.Namespace) -> int:
    found, removed = _run(args, remove=not args.dry_run)
    gone = found.garbage if args.dry_run else removed
    for blob in gone:
        print(f"{'would remove' if args.dry_run else 'removed'} {blob.sha256} ({blob.size} bytes)")
    total, kept = sum(blob.size for blob in gone), len(found.blobs) - len(gone)
    print(f"{len(gone)} blobs, {total} bytes{' would go' if args.dry_run else ' removed'}; {kept} stay")
    return 0


def _run(args: argparse.Namespace, *, remove: bool) -> tuple[Survey, list[Any]]:
    import anyio

    return anyio.run(_survey, args, remove)


async def _survey(args: argparse.Namespace, remove: bool) -> tuple[Survey, list[Any]]:
    from kat_stream.errors import ConfigError
    from kat_stream.log import open_log
    from kat_stream.log.blobs import BlobStore
    from kat_stream.log.sweeper import survey
    from kat_stream.log.sweeper import sweep as remove_garbage
    from kat_stream.observe.sources import archived_messages
    from kat_stream.runs import blobs_url, find_run, load_run, seems_live

    run_dir = find_run(args.run or "latest")
    config = load_run(run_dir)
    in_memory = config.log.url.startswith("memory:")
    if in_memory and seems_live(run_dir):
        raise ConfigError(f"{run_dir} runs, and its log is in its own process: sweep when it has ended")
    archived = archived_messages(run_dir / "archive") if (run_dir / "archive").is_dir() else ()
    log = None if in_memory else open_log(config.log.url, security=config.log.security)
    store = BlobStore(blobs_url(config, run_dir))
    if log is not None:
        await log.start()
    try:
        found = await survey(store, log, archived, args.grace)
        return found, await remove_garbage(store, found, log) if remove else []
    finally:
        if log is not None:
            await log.close()
