"""The list of mistakes in mutations.py applies to the code as it is, and every one of them turns its test red."""

import subprocess
import sys

import mutations
import pytest
from mutations import MUTATIONS, REPORT, ROOT, row_start


def test_every_mistake_can_be_made() -> None:
    problems = []
    for mutation in MUTATIONS:
        try:
            mutation.applied((ROOT / mutation.file).read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


def test_every_named_test_exists() -> None:
    for mutation in MUTATIONS:
        for test in mutation.tests:
            file, function = test.split("[")[0].split("::")
            assert f"\ndef {function}(" in (ROOT / file).read_text(encoding="utf-8"), f"{mutation.name}: {test}"


def test_a_text_that_is_gone_or_repeated_is_refused() -> None:
    mutation = mutations.Mutation("a/b/c", "file", "old", "new", "what", "test")
    assert mutation.applied("an old line") == "an new line"
    for source in ("a line", "old and old"):
        with pytest.raises(ValueError, match=r"a/b/c: the text to replace occurs \d times in file"):
            mutation.applied(source)


def test_the_report_has_a_row_for_every_mistake_and_none_survived() -> None:
    lines = REPORT.read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| `")]
    assert len({row_start(mutation) for mutation in MUTATIONS}) == len(MUTATIONS)
    assert [row_start(mutation) for mutation in MUTATIONS] == [row[: row.rindex("| ", 0, -2) + 2] for row in rows]
    assert not [row for row in rows if "survived" in row]


@pytest.mark.slow
def test_every_mistake_turns_a_test_red() -> None:
    """In a process of its own: it forks, which needs one without threads and without the package."""
    done = subprocess.run([sys.executable, mutations.__file__], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
