"""The Aider polyglot benchmark: what an exercise hides, which are broken or cannot be done here, and by what words."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from kat_stream.env.datasets import open_dataset, toolchains
from kat_stream.errors import TaskError
from tests.contract.env_kit import exercise, write


def test_an_exercise_hides_what_holds_its_solution(tmp_path: Path) -> None:
    exercise(tmp_path)
    dataset = open_dataset(f"polyglot:{tmp_path}?language=python")
    task = dataset.tasks()[0]
    assert task.task_id == "python/add-two"
    assert set(dataset.files(task)) == {".docs/instructions.md", ".gitignore", "add_two.py", "add_two_test.py"}
    assert "Add two numbers." in task.instruction
    assert "add_two.py" in task.instruction


def test_a_broken_exercise_is_named(tmp_path: Path) -> None:
    exercise(tmp_path, "a-testless", test=[])
    write(exercise(tmp_path, "b-garbled"), {".meta/config.json": "{"})
    exercise(tmp_path, "c-outside", solution=["../../../../../etc/passwd"])
    (exercise(tmp_path, "d-latin") / ".docs" / "instructions.md").write_bytes(b"caf\xe9\n")
    exercise(tmp_path, "e-nul", editor=["a\0b"])
    exercise(tmp_path, "f-editorless", editor=["gone.h"])
    exercise(tmp_path, "g-unsolved", example=[".meta/gone.py"])
    (exercise(tmp_path, "h-linked") / "more").symlink_to("/etc/passwd")
    exercise(tmp_path, "i-nothing", solution=["i_nothing_test.py"])
    exercise(tmp_path, "j-long", test=["x" * 300])
    exercise(tmp_path, "k-sound")
    *broken, sound = open_dataset(f"polyglot:{tmp_path}").scan()
    reasons = [
        "files.test is empty",
        "config.json: ",
        "lies outside the exercise",
        "instructions.md: 'utf-8' codec",
        "'a\\x00b' is not the name of a file",
        "gone.h: not a regular file",
        "gone.py: not a regular file",
        "more: not a regular file",
        "nothing is left to be graded",
        "File name too long",
    ]
    for entry, reason in zip(broken, reasons, strict=True):
        assert isinstance(entry, TaskError)
        assert reason in str(entry)
    assert not isinstance(sound, TaskError)


def test_an_exercise_that_needs_what_no_sandbox_has_says_so(tmp_path: Path) -> None:
    crates = '[package]\nname = "x"\n[dependencies]\nrand = "0.8"\n'
    lists = {"solution": ["src/lib.rs", "Cargo.toml"], "test": ["tests/t.rs"], "example": [".meta/example.rs"]}
    files = {
        ".docs/instructions.md": "Add.\n",
        ".meta/config.json": msgspec.json.encode({"files": lists}).decode(),
        **dict.fromkeys((".meta/example.rs", "src/lib.rs", "tests/t.rs"), ""),
        "Cargo.toml": '[package]\nname = "x"\n',
    }
    rust, cpp = (tmp_path / language / "exercises" / "practice" for language in ("rust", "cpp"))
    write(rust / "a-tests", {**files, "Cargo.toml": crates})
    write(rust / "b-reference", {**files, ".meta/Cargo-example.toml": crates})
    write(cpp / "c-boost", {**files, "CMakeLists.txt": "find_package(Boost 1.58 REQUIRED)\n"})
    dataset = open_dataset(f"polyglot:{tmp_path}")
    tests, reference, boost = dataset.scan()
    assert isinstance(tests, TaskError)
    assert "a-tests/Cargo.toml: needs the crates rand" in str(tests)
    assert not isinstance(reference, TaskError) and reference.solution == ""
    with pytest.raises(TaskError, match="the reference solution needs the crates rand"):
        dataset.solution(reference)
    assert not isinstance(boost, TaskError) and "toolchain:boost" in boost.environment.mounts.values()


def test_tests_that_an_exercise_holds_back_are_run_and_shown(tmp_path: Path) -> None:
    lists = {"solution": ["a.js"], "test": ["a.spec.js"], "example": [".meta/proof.ci.js"]}
    files = {
        ".docs/instructions.md": "Add.\n",
        ".meta/config.json": msgspec.json.encode({"files": lists}).decode(),
        **dict.fromkeys((".meta/proof.ci.js", "a.js"), "xtest(1)"),
        "a.spec.js": "xdescribe('xtest', () => { xtest('a', max(it)); xit('b'); test.skip('c'); });",
    }
    write(tmp_path / "javascript" / "exercises" / "practice" / "a", files)
    dataset = open_dataset(f"polyglot:{tmp_path}")
    task = dataset.tasks()[0]
    all_run = b"describe('xtest', () => { test('a', max(it)); it('b'); test.skip('c'); });"
    assert dataset.tests(task)["a.spec.js"][0] == dataset.files(task)["a.spec.js"][0] == all_run
    assert dataset.files(task)["a.js"][0] == b"xtest(1)"


def test_a_java_reference_of_several_classes_lands_by_their_names(tmp_path: Path) -> None:
    """Its further classes are graded, as those of any solution, and nobody is told of them."""
    lists = {
        "solution": ["src/main/java/Poker.java"],
        "test": ["src/test/java/PokerTest.java"],
        "example": [".meta/src/reference/java/Card.java", ".meta/src/reference/java/Poker.java"],
    }
    held_back = '@Disabled("Remove to run test")\n@Test void a() {}\n'
    files = {
        ".docs/instructions.md": "Bet.\n",
        ".meta/config.json": msgspec.json.encode({"files": lists}).decode(),
        **{name: name for name in (*lists["example"], *lists["solution"])},
        "src/test/java/PokerTest.java": held_back,
    }
    write(tmp_path / "java" / "exercises" / "practice" / "poker", files)
    dataset = open_dataset(f"polyglot:{tmp_path}")
    (task,) = dataset.tasks()
    solution = {name: content.decode() for name, (content, _) in dataset.solution(task).items() if name != "solve.sh"}
    assert solution == {f"files/src/main/java/{name.rpartition('/')[2]}": name for name in lists["example"]}
    assert task.verifier.options["include"].split() == ["src/main/java/Poker.java", "src/main/java/Card.java"]
    assert "Card" not in task.instruction and not any("Card" in name for name in dataset.files(task))
    assert dataset.tests(task)["src/test/java/PokerTest.java"][0] == b"\n@Test void a() {}\n"


def test_jars_that_are_missing_are_named_with_the_way_to_get_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    toolchains._found.cache_clear()
    with pytest.raises(TaskError, match=r"org\.json:json:20190722 .*mvn -q dependency:copy"):
        toolchains.resolve({"/opt/junit": "toolchain:junit"})
