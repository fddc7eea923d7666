"""What a model is worth: metrics, diagnostics, the verdict of student against control, and checks of inputs.

Nothing here draws or prints: `report` does.
"""
