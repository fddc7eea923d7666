"""Keras models as such: architectures, files, weights, taps, folding, and what an output means (`heads`).

Nothing here trains. Keras's private names are used in `keras_internals` only.
"""
