"""Export profiles: a docstring with target and limits, and `profile()`."""
