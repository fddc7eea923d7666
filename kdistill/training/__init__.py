"""Fitting a model: optimizers, callbacks, exact checkpoints, strategies, and many students side by side.

What a step computes is in `distillation`; what a run trains, and in which order, is in `runs`.
"""
