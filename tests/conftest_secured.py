"""A broker that lets nobody in without TLS, a user and an access list: SASL_SSL, SCRAM and StandardAuthorizer."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest

from kat_stream.access import SERVICES, Rule
from kat_stream.config import SecuritySection
from kat_stream.log import broker
from kat_stream.ports import choose_port
from tests.conftest_kafka import need_java

USERS = {f"kat-{name}": f"secret-of-{name}-7391" for name in (*SERVICES, "nobody")}
MECHANISMS = ("SCRAM-SHA-256", "SCRAM-SHA-512")
RESOURCES = {"topic": 2, "group": 3, "transactional-id": 5}
OPERATIONS = {"Read": 3, "Write": 4, "Create": 5, "Describe": 8, "DescribeConfigs": 10, "AlterConfigs": 11}
LITERAL, PREFIXED, ALLOW = 3, 4, 3


@dataclass(frozen=True)
class Secured:
    """`bootstrap` takes TLS and a password; `inside` is the operator's plaintext door on loopback."""

    bootstrap: str
    inside: str
    folder: Path

    @property
    def ca_file(self) -> Path:
        return self.folder / "ca.pem"

    def password_file(self, user: str) -> Path:
        path = self.folder / f"{user}.password"
        path.touch(mode=0o600)
        path.write_text(USERS[user] + "\n")
        return path

    def section(self, user: str, **changes: Any) -> SecuritySection:
        """[log.security] of a user."""
        values = {"protocol": "SASL_SSL", "username": user, "ca_file": str(self.ca_file), **changes}
        return SecuritySection(**{"password_file": str(self.password_file(user)), **values})

    def grant(self, rules: Iterable[Rule]) -> None:
        """Give rights as an operator does."""
        anyio.run(_grant, self.inside, list(rules))


@pytest.fixture(scope="session")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Secured]:
    need_java()
    state = tmp_path_factory.mktemp("secured")
    certificates(state)
    with_port = choose_port()
    scram = [
        f"--add-scram={mechanism}=[name={user},password={password}]"
        for user, password in USERS.items()
        for mechanism in MECHANISMS
    ]
    try:
        inside = broker.up(state, settings=settings(state, with_port), format_options=scram)
        yield Secured(f"127.0.0.1:{with_port}", inside, state)
    finally:
        broker.down(state)


def settings(folder: Path, port: int) -> dict[str, str]:
    """The plaintext door is ANONYMOUS, a super user: a test's operator. Everybody else comes through SASL_SSL."""
    listeners = f"PLAINTEXT://127.0.0.1:@PORT@,CONTROLLER://127.0.0.1:@CONTROLLER_PORT@,SASL_SSL://127.0.0.1:{port}"
    login = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    plain = "org.apache.kafka.common.security.plain.PlainLoginModule required " + " ".join(
        f'user_{user}="{password}"' for user, password in USERS.items()
    )
    return {
        "listeners": listeners,
        "advertised.listeners": listeners,
        "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL",
        "inter.broker.listener.name": "PLAINTEXT",
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
        "listener.name.sasl_ssl.scram-sha-256.sasl.jaas.config": login,
        "listener.name.sasl_ssl.scram-sha-512.sasl.jaas.config": login,
        "listener.name.sasl_ssl.plain.sasl.jaas.config": f"{plain};",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(folder / "server.pem"),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(folder / "ca.pem"),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
    }


def certificates(folder: Path) -> None:
    """An authority and a server certificate for 127.0.0.1, in PEM."""
    openssl(folder, "req -x509 -newkey rsa:2048 -nodes -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca")
    openssl(folder, "req -newkey rsa:2048 -nodes -keyout server.key -out server.csr -subj /CN=127.0.0.1")
    (folder / "ext").write_text("subjectAltName=IP:127.0.0.1\n")
    sign = "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.crt -days 2 -extfile ext"
    openssl(folder, sign)
    openssl(folder, "pkcs8 -topk8 -nocrypt -in server.key -out server.pk8")
    (folder / "server.pem").write_text((folder / "server.pk8").read_text() + (folder / "server.crt").read_text())


def openssl(folder: Path, arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments.split()], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


async def _grant(inside: str, rules: list[Rule]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=inside)
    await admin.start()
    try:
        for rule in rules:
            pattern = PREFIXED if rule.prefixed else LITERAL
            what = (RESOURCES[rule.resource], rule.name, pattern, rule.principal, "*")
            reply = await admin._send_request(CreateAclsRequest(*what, OPERATIONS[rule.operation], ALLOW))
            assert [code for code, _ in reply.creation_responses] == [0], reply
    finally:
        await admin.close()
