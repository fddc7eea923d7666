"""Full int8 for TensorFlow Lite Micro: one image, its operators only, and the file as a C++ array.

Target: microcontrollers (Cortex-M, ESP32) with TensorFlow Lite for Microcontrollers. One image at a time.
`student.h` and `student.cc` beside the file contain the model and an estimate of the arena. The caller quantizes the
input.
Consumed by: `tflite::MicroInterpreter`, see `examples/microcontroller`.
Limits: at most 0.2 points below the Keras model, 98 % agreement with it.
"""

from kdistill.recipe import Profile


def profile() -> Profile:
    return Profile(
        "microcontroller",
        quantization="int8",
        input_type="int8",
        output_type="int8",
        batch=1,
        operators="micro",
        c_array=True,
        min_agreement=0.98,
    )
