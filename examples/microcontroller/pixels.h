// Pixels to int8 and back, as `kdistill.litert` does it.
#ifndef KDISTILL_PIXELS_H_
#define KDISTILL_PIXELS_H_

#include <cmath>
#include <cstdint>

namespace kdistill {

inline void Quantize(const std::uint8_t* pixels, int count, float scale, int zero_point, std::int8_t* numbers) {
  for (int i = 0; i < count; ++i) {
    const int number = static_cast<int>(std::nearbyint(pixels[i] / scale)) + zero_point;
    numbers[i] = static_cast<std::int8_t>(number < -128 ? -128 : number > 127 ? 127 : number);
  }
}

inline float Dequantize(std::int8_t number, float scale, int zero_point) { return (number - zero_point) * scale; }

inline int Largest(const std::int8_t* numbers, int count) {
  int best = 0;
  for (int i = 1; i < count; ++i) {
    if (numbers[i] > numbers[best]) best = i;
  }
  return best;
}

}  // namespace kdistill

#endif  // KDISTILL_PIXELS_H_
