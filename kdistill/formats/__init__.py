"""What a trained model from elsewhere may be: formats of files, Keras 2, stored outputs, and processes of their own.

Here a file becomes a function of arrays. How a teacher sees the images, and what a run does with it, is in `teachers`.
"""
