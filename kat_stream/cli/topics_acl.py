"""`kat-stream topics acl`: what each service must be allowed to do on the broker."""

from __future__ import annotations

import argparse
from typing import Any

from kat_stream.cli.common import add_command


def register(group: Any) -> None:
    """Add it to the commands of `topics`."""
    parser = add_command(
        group,
        "acl",
        acl,
        help="the access list of each service, for a secured broker",
        description="Prints what each service must be allowed to do, as arguments of Kafka's kafka-acls or as JSON. "
        "The user of a service is User:kat-SERVICE; `run` is kat-stream run and topics apply, `viewer` is tail, trace, "
        "ledger and lag. Groups and transactional ids begin with a run's name and are granted by the prefix. "
        "docs/kafka.md says how users and passwords are given to services.",
        examples=[
            "topics acl --service packer",
            "topics acl | xargs -L1 kafka-acls.sh --bootstrap-server HOST:PORT --command-config admin.properties",
            "topics acl --format json > acl.json",
        ],
    )
    parser.add_argument("--service", default="", metavar="S", help="only this one (default: all)")
    parser.add_argument("--format", choices=("kafka-acls", "json"), default="kafka-acls", help="default: kafka-acls")


def acl(args: argparse.Namespace) -> int:
    import json
    from dataclasses import asdict

    from kat_stream.access import SERVICES, rules_of
    from kat_stream.log import PREFIX

    services = [args.service] if args.service else list(SERVICES)
    lists = {service: rules_of(service, PREFIX) for service in services}
    if args.format == "json":
        print(json.dumps({service: [asdict(rule) for rule in rules] for service, rules in lists.items()}, indent=1))
        return 0
    for rules in lists.values():
        for rule in rules:
            print(rule.command())
    return 0
