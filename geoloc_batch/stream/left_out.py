"""What of a tar is no photo, counted by extension: photos in a format that nobody reads must not go missing unsaid."""

from __future__ import annotations

MAX_KINDS = 64
"""Extensions that are told apart: whatever the names of a tar are, the counts stay small."""
MAX_LETTERS = 12
"""A longer extension is none that anybody knows."""
MAX_NAMED = 8
"""Extensions that a warning names."""

# A name's extension has no slash.
_OTHER = "/"


class LeftOut(dict[str, int]):
    """Numbers of members by extension, lower case and without its dot; "" for names without one."""

    def add(self, extension: str, count: int = 1) -> None:
        """Count members."""
        if extension not in self:
            is_odd = len(self) >= MAX_KINDS or len(extension) > MAX_LETTERS or not extension.isprintable()
            extension = _OTHER if is_odd else extension
        self[extension] = self.get(extension, 0) + count

    def __str__(self) -> str:
        """The commonest first: "12 .heic, 3 without extension, 5 others"."""
        ranked = sorted((-count, kind) for kind, count in self.items() if kind != _OTHER)
        num_others = self.get(_OTHER, 0) - sum(count for count, _ in ranked[MAX_NAMED:])
        named = [f"{-count} .{kind}" if kind else f"{-count} without extension" for count, kind in ranked[:MAX_NAMED]]
        return ", ".join([*named, *([f"{num_others} others"] if num_others else [])])
