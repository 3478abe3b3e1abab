"""A port chosen for later is still free later: no outgoing connection gets it, and no two services of a run do."""

from __future__ import annotations

from pathlib import Path

import pytest

from kat_stream import ports
from kat_stream.config import load
from kat_stream.runs import choose_ports


def test_outgoing_connections_never_get_a_chosen_port() -> None:
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert not [port for port in (ports.choose_port() for _ in range(200)) if low <= port <= high]


def test_of_a_range_that_is_partly_outgoing_the_rest_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = tmp_path / "range"
    kernel.write_text("1024\t29997\n")
    monkeypatch.setattr(ports, "_OUTGOING", kernel)
    assert {ports.choose_port(but=[29998]) for _ in range(20)} == {29999}
    kernel.write_text("20001\t29999\n")
    assert ports.choose_port() == 20_000
    kernel.write_text("1024\t65535\n")
    assert ports.choose_port() > 0, "all are outgoing: one of them, as before"


def test_all_ports_of_a_run_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "_CHOICE", range(29_000, 29_030))
    config = choose_ports(load(None, ["gateway.more=[[0,0],[0,0],[0,0],[0,0]]"]))
    gateway = config.gateway
    found = [gateway.port, gateway.control_port, config.engine.port, *sum(gateway.more, ())]
    assert len(set(found)) == len(found) == 11
