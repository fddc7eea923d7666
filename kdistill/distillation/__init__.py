"""The student's loss and its training step: losses, terms, `Supervised` and `Distiller`.

Optimizers, epochs, checkpoints and strategies are in `training`.
"""
