"""Export profiles: each file has a docstring with target and limits, and `profile()`."""
