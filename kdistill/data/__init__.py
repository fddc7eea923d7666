"""Data sets and the order in which they are read: splits, batches, augmentation, and one module per source.

A batch is a pure function of (seed, epoch, step). What a model makes of it is in `teachers` and `distillation`.
`kdistill.data.load` reads a data set; `Examples` and `Splits` hold one.
"""

from kdistill.data.splits import Examples, Splits, load

__all__ = ["Examples", "Splits", "load"]
