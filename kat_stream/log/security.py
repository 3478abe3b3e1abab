"""How a process proves who it is to a broker: [log.security] and its secrets become aiokafka's connection options.

Invariant: a password is read here, from a file or the environment, and nowhere else; it is in no configuration, no
argument list, no log line and no error message. Children get it as this process did: by environment or file.
"""

from __future__ import annotations

import logging
import os
import ssl
from pathlib import Path
from typing import Any

from kat_stream.config import SecuritySection
from kat_stream.errors import ConfigError

log = logging.getLogger(__name__)

USERNAME, PASSWORD = "KAT_KAFKA_USERNAME", "KAT_KAFKA_PASSWORD"
"""Environment: who this process is, for clusters in which every service has a user of its own."""


def connection_options(section: SecuritySection) -> dict[str, Any]:
    """aiokafka's options; empty without security. ConfigError names the key and what is wrong with it."""
    _check(section)
    options: dict[str, Any] = {}
    if section.protocol.endswith("SSL"):
        options["ssl_context"] = _ssl_context(section)
    if section.protocol.startswith("SASL"):
        options |= {
            "sasl_mechanism": section.mechanism,
            "sasl_plain_username": _username(section),
            "sasl_plain_password": _password(section),
        }
    return {"security_protocol": section.protocol, **options} if section.protocol != "PLAINTEXT" else {}


def _check(section: SecuritySection) -> None:
    """Settings that the protocol would ignore are mistakes."""
    if not section.protocol.startswith("SASL") and (section.username or section.password_file):
        raise ConfigError(_wrong("username", f"protocol {section.protocol} has no users; use SASL_SSL"))
    if not section.protocol.endswith("SSL") and (section.ca_file or section.cert_file or section.key_file):
        raise ConfigError(_wrong("ca_file", f"protocol {section.protocol} has no certificates; use SSL or SASL_SSL"))
    if section.key_file and not section.cert_file:
        raise ConfigError(_wrong("key_file", "a key needs its certificate: set cert_file"))
    if section.protocol == "SASL_PLAINTEXT" and section.mechanism == "PLAIN":
        log.warning("log.security: PLAIN over SASL_PLAINTEXT sends the password in the clear; use SASL_SSL")


def _username(section: SecuritySection) -> str:
    name = section.username or os.environ.get(USERNAME, "")
    if not name:
        raise ConfigError(_wrong("username", f"protocol {section.protocol} needs a user: set it, or {USERNAME}"))
    return name


def _password(section: SecuritySection) -> str:
    password = _text(section.password_file).strip("\r\n") if section.password_file else os.environ.get(PASSWORD, "")
    if not password:
        source = f"{section.password_file} is empty" if section.password_file else f"no password: set it, or {PASSWORD}"
        raise ConfigError(_wrong("password_file", source))
    return password


def _ssl_context(section: SecuritySection) -> ssl.SSLContext:
    files = {key: _file(getattr(section, key), key) for key in ("ca_file", "cert_file", "key_file")}
    try:
        context = ssl.create_default_context(cafile=files["ca_file"])
    except ssl.SSLError as error:
        raise ConfigError(_wrong("ca_file", f"{section.ca_file} holds no PEM certificate")) from error
    if certificate := files["cert_file"]:
        try:
            # An empty passphrase: without one OpenSSL would ask on the terminal for that of an encrypted key.
            context.load_cert_chain(certificate, files["key_file"], password="")
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(_wrong("cert_file", "certificate and key do not fit, or the key is encrypted")) from error
    return context


def _text(path: str) -> str:
    try:
        return _read(Path(path), "password_file").decode()
    except UnicodeDecodeError as error:
        raise ConfigError(_wrong("password_file", f"{path} is not UTF-8")) from error


def _file(path: str, key: str) -> Path | None:
    """A file that can be read, where OpenSSL finds it: it does not know what ~ is."""
    if not path:
        return None
    _read(Path(path), key)
    return Path(path).expanduser()


def _read(path: Path, key: str) -> bytes:
    try:
        return path.expanduser().read_bytes()
    except (OSError, RuntimeError) as error:  # RuntimeError: a ~user who is not there
        raise ConfigError(_wrong(key, f"{path} cannot be read ({getattr(error, 'strerror', error)})")) from error


def _wrong(key: str, what: str) -> str:
    return f"log.security.{key}: {what}"
