"""What a model is worth: metrics, diagnostics, the verdict of student against control, and checks of its inputs.

Nothing here writes a page or a table: `report` does.
"""
