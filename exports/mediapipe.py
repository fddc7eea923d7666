"""Three channels in, probabilities out, with the metadata that MediaPipe's ImageClassifier needs.

Target: MediaPipe Tasks on Android, iOS, the web and in Python. One image at a time. Dynamic-range int8: float pixels
0 to 255 in (its NormalizationOptions are mean 0, std 1, because the graph scales the pixels), float probabilities out.
A student of gray images also gets three channels, and converts them to gray with the weights of Rec. 601.
Consumed by: MediaPipe's `ImageClassifier`, see `examples/` (Kotlin, Swift, Python).
Limits: at most 0.2 points below the Keras model, 98 % agreement with it.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile("mediapipe", quantization="dynamic", batch=1, output="probabilities", channels=3, min_agreement=0.98)
