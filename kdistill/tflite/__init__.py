"""Reading and running `.tflite` files with LiteRT: interpreter, flatbuffer, metadata, inspection, benchmarks.

Nothing here imports TensorFlow or Keras. How a Keras model becomes such a file is in `conversion`.
"""
