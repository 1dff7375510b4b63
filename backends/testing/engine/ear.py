"""What an engine says, written down in its order, job by job."""

from __future__ import annotations

import threading
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from functools import partial

from backends.api import Output, Sampled


@dataclass(eq=False)
class Story:
    """Everything that was said of one job."""

    name: str
    ready: list[tuple[int, int, int | None]] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    cached: int = 0
    imported: int = 0
    tokens: list[Sampled] = field(default_factory=list)
    errors: list[Exception] = field(default_factory=list)
    ended: int = 0
    late: list[str] = field(default_factory=list)
    """What was said after the end."""


class Ear:
    """The `Events` of an engine on a desk.

    `watch`, where it is set, is called in the engine's thread with the name of each event and its
    job, as it is said.
    """

    def __init__(self) -> None:
        """Nothing was said."""
        self._news = threading.Condition()
        self._stories: dict[str, Story] = {}
        self.strange: list[str] = []
        self.death: str | None = None
        self.watch: Callable[[str, str], None] | None = None

    def story(self, job: str) -> Story:
        """Begin to listen for a job that is about to be given."""
        with self._news:
            return self._stories.setdefault(job, Story(job))

    def wait(self, true: Callable[[], bool], seconds: float) -> bool:
        """Whether `true` became so, or the engine died, within `seconds`."""
        with self._news:
            self._news.wait_for(lambda: true() or self.death is not None, seconds)
            return true()

    def forget(self) -> None:
        """Listen to what is new alone."""
        with self._news:
            self._stories.clear()
            self.strange.clear()

    # ---- Events

    def ready(self, job: str, start: int, end: int, layer: int | None = None) -> None:
        """See `Events`."""
        self._note("ready", job, lambda it: it.ready.append((start, end, layer)))

    def prefilled(self, job: str, output: Output, cached: int = 0) -> None:
        """See `Events`."""

        def note(story: Story) -> None:
            story.outputs.append(output)
            story.cached = cached

        self._note("prefilled", job, note)

    def imported(self, job: str) -> None:
        """See `Events`."""

        def note(story: Story) -> None:
            story.imported += 1

        self._note("imported", job, note)

    def decoded(self, tokens: Items[tuple[str, Sampled]]) -> None:
        """See `Events`."""
        for job, sampled in tokens:
            self._note("decoded", job, partial(_add, sampled))

    def failed(self, job: str, error: Exception) -> None:
        """See `Events`."""
        self._note("failed", job, lambda it: it.errors.append(error))

    def ended(self, job: str) -> None:
        """See `Events`."""

        def note(story: Story) -> None:
            story.ended += 1

        self._note("ended", job, note)

    def died(self, reason: str) -> None:
        """See `Events`."""
        with self._news:
            self.death = reason
            self._news.notify_all()

    def _note(self, event: str, job: str, write: Callable[[Story], None]) -> None:
        if self.watch is not None:
            self.watch(event, job)
        with self._news:
            story = self._stories.get(job)
            if story is None:
                self.strange.append(f"{event} of {job!r}")
            elif story.ended:
                story.late.append(event)
            else:
                write(story)
            self._news.notify_all()


def _add(sampled: Sampled, story: Story) -> None:
    story.tokens.append(sampled)
