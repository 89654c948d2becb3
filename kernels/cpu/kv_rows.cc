#include "kernels/cpu/kv_rows.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace kvsweep::cpu {
namespace {

float FromBf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t ToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40);
}

#ifdef __F16C__

float FromF16(uint16_t bits) { return _cvtsh_ss(bits); }
uint16_t ToF16(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }

#else

float FromF16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1f;
  const uint32_t mantissa = bits & 0x3ff;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(mantissa), -24);
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

uint16_t ToF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float magnitude = std::fabs(value);
  if (value != value) return sign | 0x7e00;
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // Below 2^-14 the spacing is 2^-24; above, ten bits of the mantissa stay. nearbyint rounds to
  // even.
  if (magnitude < 6.103515625e-05f) {
    return sign | static_cast<uint16_t>(std::nearbyint(std::ldexp(magnitude, 24)));
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded >> 13) - (112 << 10));
}

#endif

// What each byte of fp8_e4m3 stands for.
constexpr std::array<float, 256> kFp8Value = [] {
  std::array<float, 256> values{};
  for (int byte = 0; byte < 256; ++byte) values[byte] = WidenFp8E4m3(static_cast<uint8_t>(byte));
  return values;
}();

// `rows` slots of one block, of one head.
void LoadRun(float* out, const std::byte* pool, const KvView& view, int64_t offset, int rows,
             int head_dim) {
  if (view.token_stride == head_dim) {
    return LoadElements(out, pool, view.dtype, offset, rows * head_dim);
  }
  for (int i = 0; i < rows; ++i) {
    LoadElements(out + i * head_dim, pool, view.dtype, offset + i * view.token_stride, head_dim);
  }
}

}  // namespace

absl::Status CheckSlots(absl::string_view what, int32_t block_size, const int32_t* block_table,
                        int32_t block_table_stride, int64_t row, int64_t tokens) {
  const int64_t blocks = (tokens + block_size - 1) / block_size;
  const int64_t available = block_table == nullptr ? 1 : block_table_stride;
  if (blocks > available) {
    return absl::InvalidArgumentError(absl::StrCat(what, ": row ", row, " holds ", tokens,
                                                   " tokens, more than its ", available,
                                                   " blocks of ", block_size));
  }
  if (block_table == nullptr) return absl::OkStatus();
  for (int64_t block = 0; block < blocks; ++block) {
    const int32_t id = block_table[row * block_table_stride + block];
    if (id < 0) {
      return absl::InvalidArgumentError(absl::StrCat(what, ": block ", block, " of row ", row,
                                                     " is ", id, ", but the row holds ", tokens,
                                                     " tokens"));
    }
  }
  return absl::OkStatus();
}

absl::Status CheckLengths(absl::string_view what, const KvView& view, const int32_t* row_active,
                          int32_t rows, int32_t kv_heads) {
  const int32_t heads = view.length_head_stride == 0 ? 1 : kv_heads;
  for (int32_t row = 0; row < rows; ++row) {
    if (!IsActive(row_active, row)) continue;
    int32_t longest = 0;
    for (int32_t head = 0; head < heads; ++head) {
      longest = std::max(longest, KvLength(view, row, head));
    }
    RETURN_IF_ERROR(CheckSlots(what, view, row, longest));
  }
  return absl::OkStatus();
}

void LoadElements(float* out, const std::byte* pool, DType dtype, int64_t offset, int count) {
  if (dtype == DType::kF32) {
    std::memcpy(out, pool + offset * 4, count * sizeof(float));
    return;
  }
  if (dtype == DType::kFp8E4m3) {
    const uint8_t* const bytes = reinterpret_cast<const uint8_t*>(pool) + offset;
    for (int i = 0; i < count; ++i) out[i] = kFp8Value[bytes[i]];
    return;
  }
  const uint16_t* const from = reinterpret_cast<const uint16_t*>(pool) + offset;
  if (dtype == DType::kBf16) {
    for (int i = 0; i < count; ++i) out[i] = FromBf16(from[i]);
    return;
  }
  int i = 0;
#ifdef __F16C__
  for (; i + 8 <= count; i += 8) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(halves));
  }
#endif
  for (; i < count; ++i) out[i] = FromF16(from[i]);
}

void StoreElements(std::byte* pool, DType dtype, int64_t offset, const float* in, int count) {
  if (dtype == DType::kF32) {
    std::memcpy(pool + offset * 4, in, count * sizeof(float));
    return;
  }
  if (dtype == DType::kFp8E4m3) {
    uint8_t* const bytes = reinterpret_cast<uint8_t*>(pool) + offset;
    for (int i = 0; i < count; ++i) bytes[i] = NarrowFp8E4m3(in[i]);
    return;
  }
  uint16_t* const to = reinterpret_cast<uint16_t*>(pool) + offset;
  if (dtype == DType::kBf16) {
    for (int i = 0; i < count; ++i) to[i] = ToBf16(in[i]);
    return;
  }
  for (int i = 0; i < count; ++i) to[i] = ToF16(in[i]);
}

void RoundElements(float* out, const float* in, DType dtype, int count) {
  if (dtype == DType::kF32) {
    std::memcpy(out, in, count * sizeof(float));
  } else if (dtype == DType::kBf16) {
    for (int i = 0; i < count; ++i) out[i] = FromBf16(ToBf16(in[i]));
  } else if (dtype == DType::kFp8E4m3) {
    for (int i = 0; i < count; ++i) out[i] = kFp8Value[NarrowFp8E4m3(in[i])];
  } else {
    for (int i = 0; i < count; ++i) out[i] = FromF16(ToF16(in[i]));
  }
}

// As Run(RotaryArgs) turns a row.
void KeyRange::Rotate(float* key, int64_t first, int tokens, int head_dim) const {
  const SlotView& rank = rotation->rank;
  const int half = head_dim / 2;
  for (int i = 0; i < tokens; ++i) {
    const int64_t slot = first + i;
    int64_t place = own_position + slot - stored;
    if (slot < stored) {
      place = view->first_token + slot;
      if (rank.data != nullptr) {
        place = static_cast<const int32_t*>(rank.data)[SlotOffset(rank, row, place, head)];
      }
    }
    float* const low = key + int64_t{i} * head_dim;
    float* const high = low + half;
    for (int j = 0; j < half; ++j) {
      const float angle = static_cast<float>(place) * rotation->inverse_frequency[j];
      const float cosine = std::cos(angle);
      const float sine = std::sin(angle);
      const float x = low[j];
      const float y = high[j];
      low[j] = x * cosine - y * sine;
      high[j] = y * cosine + x * sine;
    }
  }
}

void KeyRange::Load(float* key, float* value, int64_t first, int tokens, int head_dim) const {
  int done = 0;
  // Run by run of slots inside one block.
  while (done < tokens && first + done < stored) {
    const int64_t slot = first + done;
    const int64_t in_block = view->block_size - slot % view->block_size;
    const int run = static_cast<int>(std::min<int64_t>({in_block, tokens - done, stored - slot}));
    const int64_t offset = KvOffset(*view, row, slot, head);
    LoadRun(key + done * head_dim, view->key, *view, offset, run, head_dim);
    if (value != nullptr) {
      LoadRun(value + done * head_dim, view->value, *view, offset, run, head_dim);
    }
    done += run;
  }
  for (; done < tokens; ++done) {
    const int64_t own = first + done - stored;
    RoundElements(key + done * head_dim, own_key + own * own_key_stride, view->dtype, head_dim);
    if (value == nullptr) continue;
    RoundElements(value + done * head_dim, own_value + own * own_value_stride, view->dtype,
                  head_dim);
  }
  if (rotation != nullptr && rotation->inverse_frequency != nullptr) {
    Rotate(key, first, tokens, head_dim);
  }
  for (; done % 8 != 0; ++done) {
    std::memset(key + done * head_dim, 0, head_dim * sizeof(float));
    if (value != nullptr) std::memset(value + done * head_dim, 0, head_dim * sizeof(float));
  }
}

}  // namespace kvsweep::cpu
