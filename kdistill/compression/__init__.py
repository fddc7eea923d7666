"""Pruning, clustering and quantization-aware training with the teacher kept on, over a bridge to tf_keras and tfmot.

The only room that imports tf_keras and tensorflow-model-optimization.
"""
