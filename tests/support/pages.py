"""The code on the pages: fenced blocks, their language and their mark, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"(?:<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<kind>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^\s*(?:\.venv/bin/)?(?:kdistill|python|pip|make|git|adb|TF_CONFIG\S*) ", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block. `mark`: the HTML comment on the line before it, such as `not run: needs a GPU`."""

    page: Path
    line: int
    kind: str
    mark: str
    code: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def mark_of(self, name: str) -> str:
        """What the mark says after `name:`; empty without such a mark."""
        return self.mark.removeprefix(f"{name}: ") if self.mark.startswith(f"{name}: ") else ""

    @property
    def commands(self) -> list[list[str]]:
        """The words of each command of a block of the shell, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, from top to bottom."""
    text = page.read_text()
    return [
        Block(page, text[: match.start("kind")].count("\n") + 1, match["kind"], match["mark"] or "", match["code"])
        for match in FENCE.finditer(text)
    ]


def inline_commands(page: Path) -> list[str]:
    """Commands in the running text and in tables: `kdistill WORDS` in backticks, also over the end of a line."""
    text = FENCE.sub("", page.read_text())
    return [" ".join(command.split()) for command in re.findall(r"`(kdistill [a-z][^`]*)`", text)]
