"""Recipes: a docstring with command, cost and result, and `recipe(variant)`."""
