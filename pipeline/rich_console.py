"""A rich console that only writes text and rich's own styles. It is separate from `terminal`, because rich is slow to import."""

from collections.abc import Iterable
from typing import IO

import rich.console
import rich.segment

from ..store.shown import harmless


class Console(rich.console.Console):
    """A console whose own styles are the only control sequences that it writes."""

    def __init__(self, file: IO[str], *, width: int | None = None) -> None:
        super().__init__(file=file, width=width, markup=False, emoji=False, highlight=False)

    def _render_buffer(self, buffer: Iterable[rich.segment.Segment]) -> str:
        """All output passes here, split into styled text and control sequences."""
        return super()._render_buffer(each if each.control else each._replace(text=harmless(each.text)) for each in buffer)
