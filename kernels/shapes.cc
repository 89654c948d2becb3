#include "kernels/shapes.h"

#include <bit>
#include <cmath>
#include <cstring>

namespace kvsweep {
namespace {

float WidenBf16(uint16_t word) { return std::bit_cast<float>(uint32_t{word} << 16); }

float WidenF16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t exponent = (half >> 10) & 0x1fu;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa times 2^-24
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  // 31 is infinity or NaN in both formats; else move the bias from 15 to 127.
  const uint32_t wide_exponent = exponent == 31 ? 255 : exponent + (127 - 15);
  return std::bit_cast<float>(sign | wide_exponent << 23 | mantissa << 13);
}

uint16_t NarrowBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t NarrowF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;  // halfway past the largest number
  if (magnitude < 0x1p-14f) {
    // Subnormal: adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded.
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(magnitude + 0.5f) & 0x7ffu);
  }
  const uint32_t wide = std::bit_cast<uint32_t>(magnitude) - ((127u - 15u) << 23);
  return sign | static_cast<uint16_t>((wide + 0xfff + ((wide >> 13) & 1)) >> 13);
}

template <typename Widen>
void WidenWords(const void* elements, std::span<float> out, Widen widen) {
  const auto* bytes = static_cast<const std::byte*>(elements);
  for (size_t i = 0; i < out.size(); ++i) {
    uint16_t word;
    std::memcpy(&word, bytes + i * sizeof(word), sizeof(word));
    out[i] = widen(word);
  }
}

template <typename Narrow>
void NarrowWords(std::span<const float> values, void* out, Narrow narrow) {
  auto* bytes = static_cast<std::byte*>(out);
  for (size_t i = 0; i < values.size(); ++i) {
    const uint16_t word = narrow(values[i]);
    std::memcpy(bytes + i * sizeof(word), &word, sizeof(word));
  }
}

}  // namespace

const char* DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "f32";
    case DType::kBf16:
      return "bf16";
    case DType::kF16:
      return "f16";
    case DType::kFp8E4m3:
      return "fp8_e4m3";
  }
  return "unknown";
}

void ToFloats(const void* elements, DType dtype, std::span<float> out) {
  switch (dtype) {
    case DType::kF32:
      if (!out.empty()) std::memcpy(out.data(), elements, out.size_bytes());
      return;
    case DType::kBf16:
      return WidenWords(elements, out, WidenBf16);
    case DType::kF16:
      return WidenWords(elements, out, WidenF16);
    case DType::kFp8E4m3:
      for (size_t i = 0; i < out.size(); ++i) {
        out[i] = WidenFp8E4m3(static_cast<const uint8_t*>(elements)[i]);
      }
      return;
  }
}

void FromFloats(std::span<const float> values, DType dtype, void* out) {
  switch (dtype) {
    case DType::kF32:
      if (!values.empty()) std::memcpy(out, values.data(), values.size_bytes());
      return;
    case DType::kBf16:
      return NarrowWords(values, out, NarrowBf16);
    case DType::kF16:
      return NarrowWords(values, out, NarrowF16);
    case DType::kFp8E4m3:
      for (size_t i = 0; i < values.size(); ++i) {
        static_cast<uint8_t*>(out)[i] = NarrowFp8E4m3(values[i]);
      }
      return;
  }
}

uint8_t NarrowFp8E4m3(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  const float magnitude = std::fabs(value);
  if (std::isnan(value)) return sign | 0x7f;
  if (magnitude >= 448.0f) return sign | 0x7e;
  if (magnitude < 0x1p-6f) {
    // Subnormal: multiples of 2^-9; nearbyint rounds to even, and 8 of them are the least normal.
    return sign | static_cast<uint8_t>(std::nearbyint(magnitude * 0x1p9f));
  }
  // Three bits of the mantissa stay; a carry out of it moves into the exponent, the bias goes from
  // 127 to 7.
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  const uint32_t rounded = bits + 0x7ffff + ((bits >> 20) & 1);
  const uint32_t narrowed = (rounded >> 20) - ((127u - 7u) << 3);
  return sign | static_cast<uint8_t>(narrowed > 0x7e ? 0x7e : narrowed);
}

}  // namespace kvsweep
