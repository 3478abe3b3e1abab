"""[log.security]: mistakes are named, and a password is nowhere but in the connection."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest

from kat_stream.config import SecuritySection, dump, load
from kat_stream.errors import ConfigError
from kat_stream.log import kafka_client
from kat_stream.log.kafka_client import Broker
from kat_stream.log.security import connection_options

SECRET = "hunter2-of-the-test"
USER: dict[str, Any] = {"protocol": "SASL_PLAINTEXT", "username": "u"}


def test_without_security_there_are_no_options() -> None:
    assert connection_options(SecuritySection()) == {}


def test_a_password_file_wins_and_loses_its_newline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p").write_text(f"{SECRET}\n")
    monkeypatch.setenv("KAT_KAFKA_PASSWORD", "another")
    options = connection_options(SecuritySection(**USER, password_file=str(tmp_path / "p")))
    assert options == {
        "security_protocol": "SASL_PLAINTEXT",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "u",
        "sasl_plain_password": SECRET,
    }
    assert SECRET not in repr(Broker("h:1", security=options))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"username": "u"}, "username: protocol PLAINTEXT has no users; use SASL_SSL"),
        ({"protocol": "SASL_SSL"}, "username: protocol SASL_SSL needs a user: set it, or KAT_KAFKA_USERNAME"),
        (USER, "password_file: no password: set it, or KAT_KAFKA_PASSWORD"),
        ({**USER, "password_file": "/no/such"}, "password_file: /no/such cannot be read"),
        ({**USER, "ca_file": "x"}, "ca_file: protocol SASL_PLAINTEXT has no certificates"),
        ({"protocol": "SSL", "ca_file": "/no/such.pem"}, "ca_file: /no/such.pem cannot be read"),
        ({"protocol": "SSL", "key_file": "/k"}, "key_file: a key needs its certificate"),
        ({"protocol": "SSL", "ca_file": __file__}, "ca_file: .* holds no PEM certificate"),
        ({"protocol": "SSL", "cert_file": __file__}, "cert_file: certificate and key do not fit"),
    ],
)
def test_a_mistake_names_its_key(values: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAT_KAFKA_PASSWORD", raising=False)
    monkeypatch.delenv("KAT_KAFKA_USERNAME", raising=False)
    with pytest.raises(ConfigError, match=rf"log\.security\.{message}"):
        connection_options(SecuritySection(**values))


@pytest.mark.parametrize(
    ("key", "content", "message"),
    [
        ("ca_file", b"\x30\x82\x01\xff\xfe\x80", "holds no PEM certificate"),
        ("cert_file", b"\x30\x82\x01\xff\xfe\x80", "certificate and key do not fit"),
        ("password_file", b"p\xe4ss", "is not UTF-8"),
    ],
)
def test_bytes_that_are_no_text_are_a_mistake(key: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(content)
    values = USER if key == "password_file" else {"protocol": "SSL"}
    with pytest.raises(ConfigError, match=rf"log\.security\.{key}: .*{message}"):
        connection_options(SecuritySection(**values, **{key: str(tmp_path / "f")}))


def test_a_file_in_the_home_directory_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By OpenSSL, too: it says that the file holds nothing, not that it is missing."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"ca_file: ~/ca\.pem holds no PEM certificate"):
        connection_options(SecuritySection(protocol="SSL", ca_file="~/ca.pem"))
    with pytest.raises(ConfigError, match=r"ca_file: ~nobody-at-all/ca\.pem cannot be read"):
        connection_options(SecuritySection(protocol="SSL", ca_file="~nobody-at-all/ca.pem"))


def test_a_secured_address_without_a_port_has_kafka_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    async def nobody_is_there(host: str, port: int, **_: Any) -> None:
        asked.append((host, port))
        raise ConnectionRefusedError

    monkeypatch.setattr(kafka_client, "create_conn", nobody_is_there)
    for bootstrap in ("localhost", "localhost:9093", "[::1]"):
        anyio.run(kafka_client.refused_at_the_door, Broker(bootstrap, security={"security_protocol": "SSL"}))
    assert asked == [("localhost", 9092), ("localhost", 9093), ("::1", 9092)]


def test_an_empty_password_file_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "p").write_text("\n")
    with pytest.raises(ConfigError, match=r"password_file: .*p is empty"):
        connection_options(SecuritySection(**USER, password_file=str(tmp_path / "p")))


@pytest.mark.parametrize("form", ["file", "set"])
def test_a_password_in_a_configuration_is_refused_and_not_repeated(tmp_path: Path, form: str) -> None:
    (tmp_path / "c.toml").write_text(f"[log.security]\npassword = '{SECRET}'\n")
    with pytest.raises(ConfigError, match="hold no secrets; use log.security.password_file") as caught:
        load(tmp_path / "c.toml") if form == "file" else load(None, [f"log.security.password={SECRET}"])
    assert SECRET not in str(caught.value)


def test_sections_within_sections_load_dump_and_name_mistakes(tmp_path: Path) -> None:
    config = load(None, ["log.security.protocol=SASL_SSL", "log.security.username=u"])
    assert config.log.security == SecuritySection(protocol="SASL_SSL", username="u")
    (tmp_path / "c.toml").write_text(dump(config))
    assert load(tmp_path / "c.toml") == config
    with pytest.raises(
        ConfigError, match=r"unknown key `log\.security\.usrname`; did you mean `log\.security\.username`"
    ):
        load(None, ["log.security.usrname=u"])
    with pytest.raises(ConfigError, match=r"`log\.security\.protocol`: invalid enum value 'TLS', expected PLAINTEXT"):
        load(None, ["log.security.protocol=TLS"])


def test_a_dry_run_shows_no_password(tmp_path: Path) -> None:
    (tmp_path / "p").write_text(SECRET)
    command = [sys.executable, "-m", "kat_stream.cli", "run", "--dry-run", "--set", "log.security.protocol=SASL_SSL"]
    command += ["--set", "log.security.username=u", "--set", f"log.security.password_file={tmp_path / 'p'}"]
    environment = {**os.environ, "KAT_KAFKA_PASSWORD": SECRET}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    assert "password_file" in done.stdout
    assert SECRET not in done.stdout + done.stderr
