"""What backends/README.md says of the kit is so."""

import tomllib
from pathlib import Path

from backends.testing import STEPPED
from backends.testing.report import promise_list

ROOT = Path(__file__).parents[2]
README = (ROOT / "backends" / "README.md").read_text()


def test_the_list_of_promises_is_the_list_of_promises():
    """`python -m backends.testing` prints what belongs there."""
    begin, end = "<!-- promises:begin -->\n", "<!-- promises:end -->"
    shown = README.partition(begin)[2].partition(end)[0]
    assert shown == promise_list(STEPPED) + "\n"


def test_the_packaging_that_is_shown_is_that_of_the_example():
    ours = tomllib.loads((ROOT / "tests" / "third_party" / "pyproject.toml").read_text())
    text = README.partition("```toml\n")[2].partition("```")[0]
    shown = tomllib.loads(text)
    assert shown["build-system"] == ours["build-system"]
    assert shown["project"]["entry-points"] == {
        "baton.backends": {"acme": "acme_decode:AcmeBackend"}
    }
    assert shown["tool"]["setuptools"] == {"py-modules": ["acme_decode"]}
    assert ours["tool"]["setuptools"] == {"py-modules": ["abacus_decode"]}


def test_every_promise_says_in_its_first_line_what_it_is():
    for promise in STEPPED:
        assert promise.__doc__.splitlines()[0].endswith("."), promise.__name__
