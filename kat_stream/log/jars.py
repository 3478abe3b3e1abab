"""The jars of the broker: resolved once by Maven from ops/kafka/pom.xml, kept in a cache named by the pom's hash.

Invariant: a directory in the cache is complete, because it is renamed into place after Maven has finished.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from kat_stream.errors import ConfigError

CACHE = Path("~/.cache/kat-stream/kafka")
MINIMUM_JAVA = 17
RESOLVE_S = 600.0


def ops_kafka() -> Path:
    """ops/kafka of the checkout; ConfigError where the package was installed without it."""
    folder = Path(__file__).parents[2] / "ops" / "kafka"
    if not (folder / "pom.xml").is_file():
        raise ConfigError("broker: ops/kafka/pom.xml is in the checkout, not in the wheel: run from a clone")
    return folder


def classpath() -> str:
    """The class path of a broker; resolves the jars if the cache has none. ConfigError says what is missing."""
    pom = ops_kafka() / "pom.xml"
    folder = CACHE.expanduser() / hashlib.sha256(pom.read_bytes()).hexdigest()[:16]
    if not folder.is_dir():
        _resolve(pom, folder)
    return os.pathsep.join(str(jar) for jar in sorted(folder.glob("*.jar")))


def java() -> str:
    """The path of a Java that is new enough; ConfigError otherwise."""
    home = os.environ.get("JAVA_HOME")
    found = shutil.which("java", path=str(Path(home) / "bin")) if home else shutil.which("java")
    if found is None:
        raise ConfigError(f"broker: no java; Kafka needs Java {MINIMUM_JAVA}: apt-get install openjdk-17-jre-headless")
    text = subprocess.run([found, "-version"], capture_output=True, text=True, timeout=30).stderr
    match = re.search(r'version "(\d+)', text)
    if match is None or int(match[1]) < MINIMUM_JAVA:
        version = match[1] if match else text.strip()[:80]
        raise ConfigError(f"broker: {found} is Java {version}, Kafka needs {MINIMUM_JAVA}: openjdk-17-jre-headless")
    return found


def _resolve(pom: Path, folder: Path) -> None:
    maven = shutil.which("mvn")
    if maven is None:
        raise ConfigError("broker: no mvn to resolve Kafka's jars: apt-get install maven")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        jars = Path(temporary) / "jars"
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={jars}"]
        command = [maven, "-q", "-B", "-f", str(pom), *goal]
        done = subprocess.run(command, capture_output=True, text=True, timeout=RESOLVE_S)
        if done.returncode != 0:
            raise ConfigError(f"broker: Maven could not resolve Kafka's jars:\n{(done.stdout + done.stderr)[-2000:]}")
        if not folder.is_dir():
            jars.rename(folder)
