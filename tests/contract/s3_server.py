"""A real S3 API server for tests: S3Proxy over a directory, a process of its own on a free port.

Its jars come from Maven once, into a cache named by the pom's hash, as those of the broker do.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import wait_for

POM = Path(__file__).with_name("s3proxy_pom.xml")
CACHE = Path("~/.cache/kat-stream/s3proxy")
IDENTITY, SECRET, BUCKET = "kat", "kat-secret", "kat-blobs-test"
READY_S, RESOLVE_S = 60.0, 300.0
LOGBACK = '<configuration><root level="WARN"/></configuration>'


def environment(port: int) -> dict[str, str]:
    """What an S3 client needs to find and enter it."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": IDENTITY,
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
    }


def jars() -> Path:
    folder = CACHE.expanduser() / hashlib.sha256(POM.read_bytes()).hexdigest()[:16]
    if not folder.is_dir():
        resolving = folder.with_name(f"{folder.name}.{os.getpid()}")
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={resolving}"]
        subprocess.run(["mvn", "-q", "-B", "-f", str(POM), *goal], check=True, timeout=RESOLVE_S)
        if folder.is_dir():
            shutil.rmtree(resolving)
        else:
            resolving.rename(folder)
    return folder


@contextmanager
def running(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Serve `folder`, where BUCKET exists; it may be started again on what is there."""
    (folder / "data" / BUCKET).mkdir(parents=True, exist_ok=True)
    (folder / "logback.xml").write_text(LOGBACK)
    settings = {
        "s3proxy.authorization": "aws-v2-or-v4",
        "s3proxy.endpoint": f"http://127.0.0.1:{port}",
        "s3proxy.identity": IDENTITY,
        "s3proxy.credential": SECRET,
        "jclouds.provider": "filesystem-nio2",
        "jclouds.identity": "none",
        "jclouds.credential": "none",
        "jclouds.filesystem.basedir": str(folder / "data"),
    }
    (folder / "s3proxy.conf").write_text("".join(f"{key}={value}\n" for key, value in settings.items()))
    jvm = ["-Xmx256m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    jvm.append(f"-Dlogback.configurationFile={folder / 'logback.xml'}")
    main = ["-cp", f"{jars()}/*", "org.gaul.s3proxy.Main", "--properties", str(folder / "s3proxy.conf")]
    with (folder / "s3proxy.log").open("ab") as out:
        process = subprocess.Popen(["java", *jvm, *main], stdout=out, stderr=out)
    try:
        wait_for(lambda: _answers(port, process), "S3Proxy", READY_S)
        yield process
    finally:
        process.kill()
        process.wait(timeout=10)


def _answers(port: int, process: subprocess.Popen[bytes]) -> bool:
    assert process.poll() is None, "S3Proxy has ended"
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=2).close()
    except urllib.error.HTTPError:
        return True  # without a signature it refuses
    except OSError:
        return False
    return True
