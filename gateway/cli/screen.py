"""What `baton serve` shows: bars while it loads, then one screen to start from.

On a terminal the bars are redrawn in place; elsewhere each step is one plain line.
"""

from __future__ import annotations

import sys
import time
from typing import TextIO

from gateway.cli.child import Child
from gateway.config import Config
from gateway.settings import is_loopback

BAR_WIDTH = 24
UP_AND_CLEAR = "\x1b[{lines}A\x1b[J"


class Screen:
    """Progress of the children, on `out`."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._tty = out.isatty()
        self._began = time.monotonic()
        self._children: list[Child] = []
        self._drawn = 0
        self._told: dict[str, str] = {}
        self._open = True

    def follow(self, child: Child) -> None:
        """Show this child from now on."""
        self._children.append(child)
        self.update(child)

    def update(self, child: Child) -> None:
        """Something about `child` is news."""
        if not self._open or child not in self._children:
            return
        if self._tty:
            self._draw()
        else:
            self._tell(child)

    def close(self) -> None:
        """Loading is over: what happens now is in the logs."""
        self._open = False

    def _draw(self) -> None:
        if self._drawn:
            self._out.write(UP_AND_CLEAR.format(lines=self._drawn))
        self._out.write("".join(f"{self._line(child)}\n" for child in self._children))
        self._out.flush()
        self._drawn = len(self._children)

    def _line(self, child: Child) -> str:
        full = round(child.fraction * BAR_WIDTH)
        bar = "█" * full + "░" * (BAR_WIDTH - full)
        return f"  {child.name:<10} {bar} {self._words(child)}"

    def _words(self, child: Child) -> str:
        elapsed = time.monotonic() - self._began
        if child.ready.is_set():
            return f"ready after {elapsed:.1f} s" if not self._tty else "ready"
        percent = f"{child.fraction:4.0%}" if child.fraction else "    "
        rate = f" ({child.fraction / elapsed:.0%}/s)" if child.fraction and elapsed > 0 else ""
        return f"{percent} {child.phase or 'starting'}{rate}"

    def _tell(self, child: Child) -> None:
        """Quarters are news enough for a log."""
        quarter = int(child.fraction * 4)
        news = f"{child.ready.is_set()} {child.phase} {quarter}"
        if self._told.get(child.name) != news:
            self._told[child.name] = news
            self._out.write(f"{child.name}: {self._words(child).strip()}\n")
            self._out.flush()


def welcome(config: Config, address: str, logs: str) -> str:
    """The one screen: where it is, a line to copy, where things are, how to stop."""
    key = ' -H "authorization: Bearer $BATON_KEY"' if _needs_key(config) else ""
    note = "  key       put one of yours into BATON_KEY first\n" if key else ""
    body = (
        f'{{"model": "{config.model.name}", "max_tokens": 64, "stream": true, '
        '"messages": [{"role": "user", "content": "Tell me a short story."}]}'
    )
    return (
        f"\nBaton serves {config.model.name}.\n\n"
        f"  address   {address}/v1\n"
        f"  try it    curl -N {address}/v1/chat/completions"
        f" -H 'content-type: application/json'{key} -d '{body}'\n{note}"
        f"  logs      {logs}\n"
        f"  data      {config.data_dir}\n"
        "  stop      Ctrl-C\n"
    )


def _needs_key(config: Config) -> bool:
    gateway = config.gateway
    return bool(gateway.api_keys or gateway.api_keys_file) or not is_loopback(gateway.host)
