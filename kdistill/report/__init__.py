"""From plain dicts to what people read: markdown, HTML pages, SVG charts, comparisons of runs and sweeps.

Nothing here measures or decides anything: the numbers and the verdict come from `evaluation`, through `runs`.
"""
