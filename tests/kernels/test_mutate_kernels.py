"""The list of mutations is one of csrc/ as it is; that all of them are caught takes minutes: mutate_kernels.py."""

from __future__ import annotations

import json
import re

from kernel_mutations import MUTATIONS, mutate
from mutate_kernels import RESULTS, ROOT, TESTS


def test_every_mutation_can_be_made() -> None:
    for mutation in MUTATIONS:
        text = (ROOT / "csrc" / mutation.file).read_text()
        assert mutate(text, mutation) != text
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_the_tests_that_catch_them_are_there() -> None:
    for name in (test for tests in TESTS.values() for test in tests):
        file, function = name.split("::")
        assert re.search(rf"^def {function}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_all_of_them_were_caught() -> None:
    rows = json.loads(RESULTS.read_text())["mutations"]
    assert [row["name"] for row in rows] == [mutation.name for mutation in MUTATIONS]
    assert all(bool(row["caught_by"]) != bool(row["same"]) for row in rows)
