"""`kat-stream replay RUN --step N`: one optimizer step made again, to the bit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kat_stream.cli.common import add_command, add_run_argument, count, table, writing
from kat_stream.errors import ConfigError

if TYPE_CHECKING:
    from kat_stream.config import Config
    from kat_stream.replay.history import History
    from kat_stream.replay.remake import Remade


def register(subparsers: Any) -> None:
    parser = add_command(
        subparsers,
        "replay",
        replay,
        help="make an optimizer step of a run again, to the bit",
        description="Rebuilds the batch of the step from the groups that its record names, in the live log or in the "
        "archive, and compares its sha256 with the recorded one. Then it takes the newest checkpoint before the step, "
        "or the model as it ships, makes the steps in between again, and the step itself: with the run's settings loss "
        "and weights are those of the run; with --set the step (not those before it) uses another loss. Nothing of the "
        "run is written to. trainer.keep_checkpoints decides how many steps lie in between.",
        examples=[
            "replay latest --step 12",
            "replay latest --step 12 --set trainer.level=token",
            "replay runs/mine --step 12 --lineage 3fa9c1 --out /tmp/step12    batch, groups and weights as files",
        ],
    )
    add_run_argument(parser)
    parser.add_argument("--step", type=count, required=True, metavar="N", help="the optimizer step, from 1")
    parser.add_argument("--lineage", default="", metavar="L", help="of this lineage (default: the surviving branch)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write batch.npz, groups/, weights/ and step.json there"
    )
    add_remake_options(parser)


def add_remake_options(parser: argparse.ArgumentParser) -> None:
    """--set and --log, as `replay` and `shadow` take them."""
    text = "another setting of the learner"
    parser.add_argument("--set", action="append", default=[], metavar="trainer.KEY=VALUE", help=text)
    parser.add_argument("--log", default="", metavar="URL", help="kafka:host:port (default: the run's log or archive)")


def changed(run_dir: Path, settings: list[str]) -> Config:
    """The run's configuration with other settings of the learner; `ConfigError` for any that is not the learner's."""
    from kat_stream.config import load

    for setting in settings:
        if not setting.startswith("trainer."):
            raise ConfigError(f"--set {setting}: the data is the run's own; only trainer.KEY can be another")
    return load(run_dir / "config.toml", settings)


def replay(args: argparse.Namespace) -> int:
    import anyio

    from kat_stream.replay.remake import Configs
    from kat_stream.runs import find_run

    run_dir = find_run(args.run)
    configs = Configs(changed(run_dir, []), changed(run_dir, args.set))
    if args.out is not None and args.out.exists():
        raise ConfigError(f"--out {args.out} exists already")
    history, remade, where = anyio.run(_remake, args, run_dir, configs)
    same_settings = configs.recorded == configs.asked
    _tell(remade, where)
    equal = remade.metrics.get("loss") == remade.given.recorded.metrics.get("loss")
    if same_settings:
        equal = _tell_weights(remade, history) and equal
    if args.out is not None:
        from kat_stream.replay.files import write

        with writing(args.out):
            write(remade, args.out)
        print(f"written to {args.out}")
    return 0 if equal or not same_settings else 1


async def _remake(args: argparse.Namespace, run_dir: Path, configs: Any) -> tuple[History, Remade, str]:
    from kat_stream.observe.sources import open_source, read_records
    from kat_stream.replay.history import TOPICS, History
    from kat_stream.replay.remake import remake

    history = History()
    async with open_source(run_dir, args.log, configs.recorded.log.security) as source:
        async for record, _ in read_records(source, TOPICS):
            history.apply(record)
        wanted = history.step(args.step, args.lineage)
        return history, await remake(source, history, wanted, run_dir, configs), source.where


def _tell(remade: Remade, where: str) -> None:
    recorded = remade.given.recorded
    counts = f"{len(recorded.groups)} groups, {len(recorded.trained)} rollouts trained, {len(recorded.stale)} stale"
    print(f"step {recorded.step} of lineage {recorded.lineage} of run {recorded.run}, from {where}: {counts}")
    print(f"batch    sha256 {recorded.batch_sha256}, rebuilt to the bit")
    again = f", {remade.made_again} steps made again" if remade.made_again else ""
    print(f"learner  {f'checkpoint of {remade.base}' if remade.base else 'the model as it ships'}{again}")
    from kat_stream.replay.table import one_step

    print(table(one_step(recorded.metrics, remade.metrics)))


def _tell_weights(remade: Remade, history: History) -> bool:
    from kat_stream.replay.files import weights_sha256

    recorded = remade.given.recorded
    published = history.versions.get((recorded.lineage, recorded.step))
    if published is None:
        print("weights  the version that was published is gone from policy.versions")
        return True
    mine = weights_sha256(remade.learner)
    verdict = "as published" if mine == published.checksum else f"but published were {published.checksum}"
    print(f"weights  sha256 {mine}, {verdict}")
    return mine == published.checksum
