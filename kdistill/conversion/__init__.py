"""From a Keras model to a checked `.tflite` file: float32, the shipped graph, conversion, export, verification.

Reading and running such files is in `tflite`; compression before the conversion is in `compression`.
"""
