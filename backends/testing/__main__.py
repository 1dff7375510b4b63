"""`python -m backends.testing`: the list of promises, as backends/README.md shows it."""

from backends.testing.report import promise_list
from backends.testing.stepped import STEPPED

print(promise_list(STEPPED))
