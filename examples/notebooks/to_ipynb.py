"""Makes a notebook for Colab or Jupyter of a .py file with `# %%` cells, as jupytext does. Standard library only.

python to_ipynb.py ten_minutes.py        # writes ten_minutes.ipynb
"""

import json
import re
import sys
from pathlib import Path


def cells(text: str) -> list[tuple[str, str]]:
    """(kind, source) of each cell, `code` or `markdown`; magics such as `# %pip` come back to life."""
    parts = re.split(r"^# %%(?!\w)(.*)\n", text, flags=re.MULTILINE)[1:]
    pairs = []
    for mark, source in zip(parts[::2], parts[1::2], strict=True):
        kind = "markdown" if "[markdown]" in mark else "code"
        pattern = r"^# ?" if kind == "markdown" else r"^# (?=%\w)"
        pairs.append((kind, re.sub(pattern, "", source.strip("\n"), flags=re.MULTILINE)))
    return pairs


def notebook(text: str) -> dict:
    """The notebook in the format 4.5."""
    content = []
    for place, (kind, source) in enumerate(cells(text)):
        cell = {"cell_type": kind, "id": f"cell-{place}", "metadata": {}, "source": source.splitlines(keepends=True)}
        content.append(cell | ({"outputs": [], "execution_count": None} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": content, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    for name in map(Path, sys.argv[1:]):
        name.with_suffix(".ipynb").write_text(json.dumps(notebook(name.read_text()), indent=1) + "\n")
        print(name.with_suffix(".ipynb"))
