// Classifies one image with TensorFlow Lite for Microcontrollers. student.h and student.cc are made by
//   kdistill export student.keras --profile microcontroller --out files
#include <cstdint>
#include <cstdio>

#include "pixels.h"
#include "student.h"
#include "tensorflow/lite/micro/micro_interpreter.h"
#include "tensorflow/lite/micro/micro_mutable_op_resolver.h"
#include "tensorflow/lite/schema/schema_generated.h"

namespace {
alignas(16) std::uint8_t arena[student::kArenaSize];  // an estimate: look at arena_used_bytes() below
}

// `pixels`: 0..255, row by row, the channels of a pixel together. The class, or -1 if the model does not run.
int Classify(const std::uint8_t* pixels, float* score) {
  static tflite::MicroMutableOpResolver<student::kOperatorCount> resolver;
  static bool ready = false;
  if (!ready) {
    student::AddOperators(resolver);
    ready = true;
  }
  static tflite::MicroInterpreter interpreter(tflite::GetModel(student::kModel), resolver, arena, sizeof(arena));
  static const bool allocated = interpreter.AllocateTensors() == kTfLiteOk;
  if (!allocated) return -1;
  std::printf("arena: %u of %u bytes used\n", static_cast<unsigned>(interpreter.arena_used_bytes()),
              static_cast<unsigned>(sizeof(arena)));
  const int count = student::kHeight * student::kWidth * student::kChannels;
  kdistill::Quantize(pixels, count, student::kInputScale, student::kInputZeroPoint, interpreter.input(0)->data.int8);
  if (interpreter.Invoke() != kTfLiteOk) return -1;
  const std::int8_t* numbers = interpreter.output(0)->data.int8;
  const int best = kdistill::Largest(numbers, student::kClasses);
  *score = kdistill::Dequantize(numbers[best], student::kOutputScale, student::kOutputZeroPoint);
  return best;
}
