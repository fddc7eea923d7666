"""What `make docs` does beside MkDocs: pages link to files of the repository, which the site does not hold."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"\[([^\[\]]+)\]\((\.[^)\s]+)\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Links out of `docs/` become the name of the file; those that lead nowhere stay, so that the build fails."""
    folder = (DOCS / page.file.src_uri).parent

    def name_of_file(link: re.Match) -> str:
        path = (folder / link[2].partition("#")[0]).resolve()
        if not path.exists() or path.is_relative_to(DOCS):
            return link[0]
        name = f"`{path.relative_to(ROOT)}`"
        return link[1] if name.strip("`") in link[1] else f"{link[1]} ({name})"

    return LINK.sub(name_of_file, markdown)
