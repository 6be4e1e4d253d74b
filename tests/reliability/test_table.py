"""docs/reliability.md says what the tests show: no case is missing, no number is another, no test is made up."""

from __future__ import annotations

import re
from pathlib import Path

from reliability_samples import DAMAGES

REPOSITORY = Path(__file__).parents[2]
PAGE = (REPOSITORY / "docs" / "reliability.md").read_text()


def lines_of_cases() -> dict[str, list[str]]:
    """The cells of each line that names a case in brackets."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("|")
    ]
    return {cells[1][1:-1]: cells for cells in lines if re.fullmatch(r"\[[a-z-]+\]", cells[1])}


def test_the_page_has_a_line_for_each_damage_and_its_numbers() -> None:
    told = lines_of_cases()
    assert told.keys() == {damage.name for damage in DAMAGES}
    for damage in DAMAGES:
        has_error = bool(damage.errors) or damage.cut_at is not None
        is_retryable = damage.is_unit_retryable or any(error[3] for error in damage.errors)
        owed = [
            str(len(damage.rows)),
            str(len(damage.errors)),
            "yes" if damage.cut_at is not None else "no",
            ("yes" if is_retryable else "no") if has_error else "-",
            str(damage.code),
        ]
        assert told[damage.name][2:] == owed, damage.name


def test_every_test_that_the_page_names_exists() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    tests = (path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    there = {name for text in tests for name in re.findall(r"^def (test_\w+)\(", text, re.MULTILINE)}
    assert len(named) > 20
    assert named <= there, named - there
    ours = (Path(__file__).parent / name for name in ("test_damage.py", "test_ranks.py", "test_faults.py"))
    assert {name for path in ours for name in re.findall(r"^def (test_\w+)\(", path.read_text(), re.MULTILINE)} <= named
