"""What `make test` says in the end of the tests that it left out."""

import pytest
from skipped import summary

pytest_plugins = "pytester"


@pytest.fixture
def report(pytester):
    def run(source):
        pytester.makepyfile(source)
        pytester.runpytest_subprocess("-p", "no:xdist", "--junitxml=report.xml")
        return pytester.path / "report.xml"

    return run


def test_each_reason_is_a_line_with_the_number_of_tests_that_it_kept_from_running(report):
    lines = summary(
        [
            report("""
        import pytest
        @pytest.mark.skipif(True, reason="no device here")
        @pytest.mark.parametrize("i", range(3))
        def test_marked(i): pass
        def test_within(): pytest.skip("no photographs")
        def test_run(): pass
    """)
        ]
    )
    assert lines == ["skipped: 3 tests: no device here", "skipped: 1 test: no photographs"]


def test_it_says_so_when_no_test_was_left_out(report):
    assert summary([report("def test_run(): pass")]) == ["skipped: no test"]
