"""From a budget to the best checked file: students that fit, a search with one pass of the teacher, the winner's run.

`shrink` is the story. Belongs here: what a budget is, which students may be tried, and who wins. How a student trains,
converts or is judged is in the rooms below; the winner is trained by an ordinary run.
"""
