"""Recipes: each file has a docstring with command, cost and result, and `recipe(variant)`."""
