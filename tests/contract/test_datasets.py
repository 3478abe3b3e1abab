"""Every dataset kind: tasks resolve from their record alone, broken ones are named, oracle and no-op are told apart."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import msgspec
import pytest

from kat_stream.env.datasets import dataset_of, files_of, open_dataset
from kat_stream.env.datasets.base import Spec
from kat_stream.env.datasets.mend import MendDataset
from kat_stream.env.evaluation import Result, check, evaluate
from kat_stream.env.sandboxes.base import ENVIRONMENT
from kat_stream.env.sandboxes.files import pack
from kat_stream.errors import ConfigError, TaskError
from tests.contract.env_kit import backend, exercise, harbor_task, needs_bwrap, write

pytestmark = pytest.mark.anyio

BROKEN: dict[str, tuple[dict[str, str | None], str]] = {
    "no tests": ({"tests/test.sh": None}, "tests/test.sh: missing"),
    "broken toml": ({"task.toml": "version = "}, "task.toml:"),
    "work among the tests": (
        {"environment/Dockerfile": "FROM a\nWORKDIR /tests/x\n"},
        "one that the tests have for themselves",
    ),
    "work among the results": (
        {"environment/Dockerfile": "FROM a\nWORKDIR /logs\n"},
        "one that the tests have for themselves",
    ),
    "no toml": ({"task.toml": None}, "task.toml: missing"),
    "no instruction": ({"instruction.md": None}, "instruction.md: missing"),
    "bad number": ({"task.toml": "[agent]\ntimeout_sec = 'soon'\n"}, "agent.timeout_sec = 'soon'"),
    "bad size": ({"task.toml": "[environment]\nmemory = 'lots'\n"}, "environment.memory = 'lots'"),
    "not a table": ({"task.toml": "agent = 3\n"}, "[agent] is not a table"),
    "run": ({"environment/Dockerfile": "FROM a\nRUN apt-get install \\\n  gcc\n"}, "Dockerfile:2: RUN needs an image"),
    "stages": ({"environment/Dockerfile": "FROM a\nFROM b\n"}, "Dockerfile:2: FROM: a second stage"),
    "from image": ({"environment/Dockerfile": "FROM a\nCOPY --from=b x /app/\n"}, "--from=b needs an image"),
    "leaves": ({"environment/Dockerfile": "FROM a\nWORKDIR /app\nCOPY ../tests /app/\n"}, "leaves"),
    "absent": ({"environment/Dockerfile": "FROM a\nWORKDIR /app\nCOPY gone /app/\n"}, "gone is not in"),
    "elsewhere": ({"environment/Dockerfile": "FROM a\nWORKDIR /app\nCOPY repo /srv/\n"}, "outside the work directory"),
    "unknown variable": (
        {"environment/Dockerfile": "FROM a\nWORKDIR /app\nENV PATH=$GOPATH/bin:$PATH\n"},
        "Dockerfile:3: ENV: $GOPATH is not set in this Dockerfile",
    ),
    "open quote": ({"environment/Dockerfile": "FROM a\nENV MSG=it's\n"}, "Dockerfile:2: ENV: it's: no closing '"),
    "open brace": ({"environment/Dockerfile": "FROM a\nWORKDIR ${H:-/app\n"}, "no closing }"),
    "other form": ({"environment/Dockerfile": "FROM a\nARG H=x\nWORKDIR /${H%x}\n"}, "only :-, -, :+ and +"),
    "no name": ({"environment/Dockerfile": "FROM a\nENV a-b=1\n"}, "Dockerfile:2: ENV: environment variable 'a-b'"),
    "no value": ({"environment/Dockerfile": "FROM a\nENV HERE\n"}, "Dockerfile:2: ENV: 'HERE' is not name=value"),
    "stars": ({"environment/Dockerfile": "FROM a\nWORKDIR /app\nCOPY repo/**.txt ./\n"}, "COPY: repo/**.txt: "),
    "nul": ({"environment/Dockerfile": 'FROM a\nWORKDIR /app\nCOPY ["a\\u0000b", "./"]\n'}, "holds a NUL byte"),
    "numbers": ({"environment/Dockerfile": "FROM a\nWORKDIR /app\nCOPY [1, 2]\n"}, "is not a list of strings"),
    "left out": ({"environment/.dockerignore": "repo\n"}, "Dockerfile:3: COPY: repo/ is not in"),
    "wrong pattern": ({"environment/.dockerignore": "[\n"}, ".dockerignore: [: "),
    "url": ({"environment/Dockerfile": "FROM a\nADD ftp://host/x /app/\n"}, "only plain files"),
    "not text": ({"task.toml": "a = " + "[" * 9000}, "task.toml: maximum recursion"),
    "endless number": ({"task.toml": f"[agent]\ntimeout_sec = 1{'0' * 5000}\n"}, "task.toml: Exceeds the limit"),
    "no number": ({"task.toml": "[agent]\ntimeout_sec = nan\n"}, "agent.timeout_sec = nan is not a number above 0"),
    "infinite": ({"task.toml": "[environment]\nmemory_mb = inf\n"}, "environment.memory_mb = inf"),
    "too much": ({"task.toml": "[environment]\nmemory = '99999999999T'\n"}, "is not a size"),
    "no room": ({"task.toml": "[environment]\nstorage_mb = 1\n", "environment/repo/x": "x" * (1 << 20)}, "do not fit"),
    "steps": ({"task.toml": "[[steps]]\nname = 'plan'\n", "instruction.md": None}, "a task of several steps"),
    "gpu": ({"task.toml": "[environment]\ngpus = 1\n"}, "environment.gpus is not supported"),
    "servers": ({"task.toml": "[[environment.mcp_servers]]\nname = 'a'\n"}, "environment.mcp_servers is not"),
    "windows": ({"task.toml": "[environment]\nos = 'Windows'\n"}, "environment.os = 'Windows' is not linux"),
    "tests' variables": ({"task.toml": "[verifier.env]\nMODEL = 'm'\n"}, "verifier.env is not supported"),
    "tests' image": (
        {"task.toml": "[verifier]\nenvironment_mode = 'separate'\n", "tests/Dockerfile": "FROM a\n"},
        "tests/Dockerfile: the tests' own image is not built",
    ),
    "services": ({"environment/docker-compose.yaml": "services: {db: {image: b}}\n"}, "docker-compose.yaml: services"),
    "host's variable": ({"task.toml": "[environment.env]\nKEY = '${KEY}'\n"}, "environment.env.KEY = '${KEY}' is not"),
    "system's": ({"environment/Dockerfile": "FROM a\nWORKDIR /etc/nginx\n"}, "/etc/nginx is one of the system's"),
    "deep": ({"environment/Dockerfile": f"FROM a\nCOPY {'[' * 90000}\n"}, "COPY: maximum recursion depth"),
    "no end": ({"environment/Dockerfile": "FROM a\nRUN make \\\n"}, "Dockerfile:2: RUN needs an image"),
    "file and directory": (
        {"environment/Dockerfile": "FROM a\nWORKDIR /app\nCOPY repo/state.txt x\nCOPY repo/ x/\n"},
        "/app/x is copied as a file and, for /app/x/state.txt, as a directory",
    ),
    "image only": (
        {"environment/Dockerfile": None, "task.toml": "[environment]\ndocker_image = 'x/y'\n"},
        "docker_image = 'x/y'",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_task_directory_is_named_and_the_others_stay(tmp_path: Path, case: str) -> None:
    files, reason = BROKEN[case]
    broken = harbor_task(tmp_path, "a-broken", files)
    harbor_task(tmp_path, "b-sound")
    dataset = open_dataset(f"harbor:{tmp_path}")
    error, task = dataset.scan()
    assert isinstance(error, TaskError)
    assert str(broken) in str(error)
    assert reason in str(error)
    assert [task.task_id for task in dataset.tasks()] == ["b-sound"]


def test_a_link_in_the_environment_is_refused(tmp_path: Path) -> None:
    path = harbor_task(tmp_path)
    (path / "environment" / "repo" / "shadow").symlink_to("/etc/shadow")
    with pytest.raises(TaskError, match="shadow: not a regular file"):
        raise next(iter(open_dataset(f"harbor:{tmp_path}").scan()))  # type: ignore[misc]


@pytest.mark.parametrize("place", ["tests", "solution"])
def test_a_link_among_tests_or_solution_is_found_before_any_rollout(tmp_path: Path, place: str) -> None:
    (harbor_task(tmp_path) / place / "alias.sh").symlink_to("test.sh")
    error = next(iter(open_dataset(f"harbor:{tmp_path}").scan()))
    assert isinstance(error, TaskError)
    assert f"{place}/alias.sh: not a regular file" in str(error)


@pytest.mark.parametrize("name", ["instruction.md", "environment", "tests", "solution", "environment/Dockerfile"])
def test_what_lies_elsewhere_is_not_read_through_a_link(tmp_path: Path, name: str) -> None:
    path = harbor_task(tmp_path / "set")
    (path / name).rename(tmp_path / "secret")
    (path / name).symlink_to(tmp_path / "secret")
    error = next(iter(open_dataset(f"harbor:{tmp_path / 'set'}").scan()))
    assert isinstance(error, TaskError)
    assert f"{path / name}: " in str(error)


def test_a_set_is_scanned_to_its_end_whatever_it_is_called(tmp_path: Path) -> None:
    """A clone's .git is no task; a name that no record and no terminal could hold is that task's error."""
    (tmp_path / ".git").mkdir()
    harbor_task(tmp_path, "a\nb")
    harbor_task(tmp_path, "caf\udce9")
    os.mkfifo(harbor_task(tmp_path, "d", {"instruction.md": None}) / "instruction.md")
    harbor_task(tmp_path, "e")
    *errors, sound = open_dataset(f"harbor:{tmp_path}").scan()
    assert [str(error).partition(": ")[2] for error in errors] == [
        "'a\\nb' is not the name of a task",
        "'caf\\udce9' is not the name of a task",
        "not a regular file",
    ]
    assert not isinstance(sound, TaskError)


def test_the_work_directory_and_variables_of_task_toml_go_before_the_images(tmp_path: Path) -> None:
    toml = "[environment]\nworkdir = '/srv/x'\n[environment.env]\nA = 'toml'\nB = '${B:-given}'\n"
    dockerfile = "FROM a\nENV A=image C=image\nWORKDIR /app\nCOPY repo/ /srv/x/\n"
    path = harbor_task(tmp_path, files={"task.toml": toml, "environment/Dockerfile": dockerfile})
    dataset = open_dataset(f"harbor:{path}")
    environment = dataset.tasks()[0].environment
    assert environment.workdir == "/srv/x"
    assert environment.env == {"A": "toml", "B": "given", "C": "image"}
    assert set(dataset.files(dataset.tasks()[0])) == {"state.txt"}


COPIES = {
    "COPY repo/state.txt /app": {"state.txt"},
    "COPY repo/ d/\nCOPY repo/state.txt d": {"d/state.txt"},
    "COPY repo/state.txt d/sub": {"d/sub"},
    "COPY repo/sta\\\nte.txt s\\\n  \n# between\n/x": {"s/x"},
}


@pytest.mark.parametrize("lines", COPIES)
def test_a_copy_lands_where_docker_puts_it(tmp_path: Path, lines: str) -> None:
    path = harbor_task(tmp_path, files={"environment/Dockerfile": f"\ufeffFROM a\nWORKDIR //app\n{lines}\n"})
    dataset = open_dataset(f"harbor:{path}")
    assert set(dataset.files(dataset.tasks()[0])) == COPIES[lines]


def test_an_archive_is_one_by_its_content(tmp_path: Path) -> None:
    dockerfile = "FROM a\nWORKDIR /app\nADD repo/ d/\nADD bundle ./\n"
    path = harbor_task(tmp_path, files={"environment/Dockerfile": dockerfile, "environment/bundle": "text"})
    assert len(open_dataset(f"harbor:{tmp_path}").tasks()) == 1
    (path / "environment" / "bundle").write_bytes(pack({"x": (b"x", 0o644)}))
    error = next(iter(open_dataset(f"harbor:{tmp_path}").scan()))
    assert "bundle: only plain files" in str(error)


def test_a_path_may_hold_what_a_spec_means_something_by(tmp_path: Path) -> None:
    path = harbor_task(tmp_path / "a?b%41&c=d", "fix#it")
    spec = f"harbor:{tmp_path}/a%3Fb%2541&c=d"
    (task,) = open_dataset(spec).tasks()
    assert set(dataset_of(task).files(task)) == {"state.txt"} and path.is_dir()
    with_options = Spec.parse(spec).with_options(language="a&b")
    assert (Spec.parse(with_options).location, Spec.parse(with_options).options) == (
        str(path.parent),
        {"language": "a&b"},
    )


def test_an_id_may_hold_a_number_sign(tmp_path: Path) -> None:
    harbor_task(tmp_path, "issue#12")
    task = open_dataset(f"harbor:{tmp_path}").tasks()[0]
    assert set(dataset_of(task).files(task)) == {"state.txt"}
    with pytest.raises(TaskError, match="is not `dataset-spec#other`"):
        dataset_of(msgspec.structs.replace(task, task_id="other"))


def test_a_dockerfile_without_a_build_gives_the_work_tree(tmp_path: Path) -> None:
    dockerfile = """# comment
FROM debian:bookworm-slim AS only
ARG place=/srv/work
ENV HOME_OF="${place}" MODE=fast
ENV OLD style value
WORKDIR $place
COPY --chown=1:1 --chmod=755 ["repo/run.sh", "./bin/"]
COPY repo/a.txt repo/b.txt docs/
COPY \\
  repo \\
  tree
USER agent
CMD ["sleep", "1"]
"""
    path = harbor_task(tmp_path, files={"environment/Dockerfile": dockerfile})
    write(path / "environment" / "repo", {"run.sh": "#!/bin/sh\n", "a.txt": "a", "b.txt": "b"})
    dataset = open_dataset(f"harbor:{path}")
    task = dataset.tasks()[0]
    assert task.environment.workdir == "/srv/work"
    assert task.environment.env == {"HOME_OF": "/srv/work", "MODE": "fast", "OLD": "style value"}
    files = dataset.files(task)
    assert files["bin/run.sh"] == (b"#!/bin/sh\n", 0o755)
    assert {"docs/a.txt", "docs/b.txt", "tree/state.txt", "tree/run.sh"} < set(files)


VALUES = {
    'ENV V="/root/.local/bin:$PATH"': f"/root/.local/bin:{ENVIRONMENT['PATH']}",
    "ENV V=$HOME/x": "/home/agent/x",
    "ENV V='x $HOME \"y\"'": 'x $HOME "y"',
    'ENV V="it\'s \\$HOME \\a"': "it's $HOME \\a",
    "ENV V=\\$HOME\\ x": "$HOME x",
    "ENV V one 'two'  $N": "one two  7",
    "ENV V=${N:-/app}": "7",
    "ENV V=${NONE:-/a${N}}": "/a7",
    "ENV V=${EMPTY:-x}${EMPTY-y}": "x",
    "ENV V=${N:+set}${EMPTY:+x}${NONE:+y}${EMPTY+empty}": "setempty",
    "ENV N=8 V=$N": "7",
    "ARG N\nENV V=$N": "7",
    "ARG GIVEN\nENV V=<$GIVEN>": "<>",
    "ENV V=5$": "5$",
}


@pytest.mark.parametrize("line", VALUES)
def test_quotes_and_variables_are_what_docker_makes_of_them(tmp_path: Path, line: str) -> None:
    path = harbor_task(tmp_path, files={"environment/Dockerfile": f"FROM a\nARG N=7\nARG EMPTY=\n{line}\n"})
    assert open_dataset(f"harbor:{path}").tasks()[0].environment.env["V"] == VALUES[line]


def test_what_dockerignore_leaves_out_does_not_enter_the_work_tree(tmp_path: Path) -> None:
    ignored = "# secrets\n/answer\n*/*.log\n**/cache\nkept\n!kept/[a-c].txt\n!repo/?.log\n.docker*\nDocker*\n"
    dockerfile = "FROM a\nWORKDIR /app\nCOPY . .\n"
    path = harbor_task(tmp_path, files={"environment/.dockerignore": ignored, "environment/Dockerfile": dockerfile})
    inside = ["answer/a", "sub/answer", "repo/x.log", "repo/xy.log", "repo/deep/y.log", "a/b/cache/c", "cache/d"]
    write(path / "environment", dict.fromkeys([*inside, "kept/a.txt", "kept/z.txt"], ""))
    dataset = open_dataset(f"harbor:{path}")
    files = set(dataset.files(dataset.tasks()[0]))
    assert files == {"sub/answer", "repo/state.txt", "repo/x.log", "repo/deep/y.log", "kept/a.txt"}


def test_limits_and_timeouts_come_from_task_toml(tmp_path: Path) -> None:
    toml = "\ufeff[agent]\r\ntimeout_sec = 7\n[environment]\nmemory = '2G'\nstorage_mb = 33\ncpus = 2\n"
    harbor_task(tmp_path, files={"task.toml": toml})
    task = open_dataset(f"harbor:{tmp_path}").tasks()[0]
    assert task.agent_timeout_s == 7.0
    assert (task.environment.memory_mb, task.environment.disk_mb, task.environment.cpus) == (2048, 33, 2.0)


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("mend", "expected scheme"),
        ("mnd:train", "did you mean 'mend'"),
        ("mend:test", "'test' is not one of train, held-out"),
        ("mend:train?cuont=3", "unknown option 'cuont'"),
        ("mend:train?count=many", "count='many' is not a number"),
        ("mend:train?count", "options"),
        ("harbor:/nowhere/at/all", "not a directory"),
        ("polyglot:/?language=cobol", "'cobol' is not one of"),
        ("polyglot:/?language=python", "not a directory"),
    ],
)
def test_a_wrong_spec_says_what_is_wrong(spec: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        open_dataset(spec)


def test_a_mend_task_is_resolved_from_its_record_alone() -> None:
    spec = "mend:train?count=20&seed=3"
    task = open_dataset(spec).tasks()[7]
    elsewhere = MendDataset(Spec.parse(spec))
    assert dataset_of(task).files(task) == elsewhere.files(task)
    assert elsewhere.tests(task)["check.sh"][0] not in [content for content, _ in elsewhere.files(task).values()]
    with pytest.raises(TaskError, match="no task 'gone'"):
        elsewhere.files(msgspec.structs.replace(task, task_id="gone"))


async def test_what_many_ask_for_at_once_is_opened_once(tmp_path: Path) -> None:
    harbor_task(tmp_path)
    spec = f"harbor:{tmp_path}"
    task = open_dataset(spec).tasks()[0]
    open_dataset.cache_clear()
    trees = await asyncio.gather(*(files_of(task, "files") for _ in range(8)))
    assert open_dataset.cache_info().misses == 1
    assert all(set(tree) == {"state.txt"} for tree in trees)


@needs_bwrap
@pytest.mark.parametrize("kind", ["mend", "mend on disk", "harbor", "polyglot"])
async def test_the_oracle_gets_1_and_doing_nothing_0(tmp_path: Path, kind: str) -> None:
    spec = _dataset(tmp_path, kind)
    async with backend() as sandboxes:
        for agent, reward in (("oracle", 1.0), ("nop", 0.0)):
            results = await evaluate(spec, agent, sandboxes, concurrency=4)
            assert [(result.task, result.reward, result.outcome) for result in results] == [
                (task.task_id, reward, "submitted") for task in open_dataset(spec).tasks()
            ]


def _dataset(tmp_path: Path, kind: str) -> str:
    if kind == "mend":
        return "mend:held-out?count=15&seed=1"
    if kind == "mend on disk":
        MendDataset(Spec.parse("mend:train?count=4&seed=1")).write(tmp_path)
        return f"harbor:{tmp_path}"
    if kind == "harbor":
        harbor_task(tmp_path, "one")
        plain = {
            "environment/Dockerfile": None,
            "environment/repo/state.txt": None,
            "environment/state.txt": "broken\n",
        }
        harbor_task(tmp_path, "two", plain)
        return f"harbor:{tmp_path}"
    exercise(tmp_path)
    odd = exercise(tmp_path, "sum-up")
    odd.rename(odd.with_name("sum up$(x)'"))
    return f"polyglot:{tmp_path}?language=python"


@needs_bwrap
async def test_the_audit_finds_what_makes_a_task_useless(tmp_path: Path) -> None:
    harbor_task(tmp_path, "a-sound")
    harbor_task(tmp_path, "b-generous", {"tests/test.sh": "#!/bin/sh\necho 1 > /logs/verifier/reward.txt\n"})
    harbor_task(tmp_path, "c-wrong-solution", {"solution/solve.sh": "#!/bin/sh\nexit 3\n"})
    harbor_task(tmp_path, "d-no-tests", {"tests/test.sh": None})
    async with backend() as sandboxes:
        sound, generous, wrong, testless = await check(f"harbor:{tmp_path}", sandboxes, concurrency=4)
    assert sound.problems == ()
    assert generous.problems == ("doing nothing gets 1.0 (submitted: )",)
    assert "exit code 3" in wrong.problems[0]
    assert "tests/test.sh: missing" in testless.problems[0]


@needs_bwrap
async def test_an_evaluation_has_one_row_a_task_and_no_reward_for_what_failed(tmp_path: Path) -> None:
    harbor_task(tmp_path, "a-no-tests", {"tests/test.sh": None})
    harbor_task(tmp_path, "b-crashing-tests", {"tests/test.sh": "#!/bin/sh\nexit 1\n"})
    harbor_task(tmp_path, "c-no-solution", {"solution/solve.sh": None})
    harbor_task(tmp_path, "d-sound")
    seen: list[Result] = []
    async with backend() as sandboxes:
        results = await evaluate(f"harbor:{tmp_path}", "oracle", sandboxes, concurrency=4, on_result=seen.append)
        limited = await evaluate(f"harbor:{tmp_path}", "nop", sandboxes, limit=1)
    assert [(result.reward, result.outcome) for result in results] == [
        (None, "task_error"),
        (None, "verifier_failed"),
        (None, "infra_error"),
        (1.0, "submitted"),
    ]
    assert "no reference solution" in results[2].detail
    assert set(results[3].as_row()) == {"task", "reward", "outcome", "seconds"}
    assert sorted(seen, key=lambda result: result.task) == sorted(results, key=lambda result: result.task)
    assert len(limited) == 1
