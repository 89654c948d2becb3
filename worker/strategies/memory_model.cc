#include "worker/strategies/memory_model.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/status_macros.h"
#include "worker/strategies/catalogue.h"

namespace kvsweep {
namespace {

TierBytes Larger(const TierBytes& a, const TierBytes& b) {
  return {std::max(a.device, b.device), std::max(a.host, b.host)};
}

}  // namespace

int32_t PaddedDecodeRows(int32_t rows) {
  for (int32_t size : {1, 2, 4}) {
    if (rows <= size) return size;
  }
  return (rows + 7) / 8 * 8;
}

DType KvDtype(const Kv& kv, DType model_dtype, DType activation_dtype) {
  switch (kv.dtype()) {
    case Kv::DTYPE_F32:
      return DType::kF32;
    case Kv::DTYPE_BF16:
      return DType::kBf16;
    case Kv::DTYPE_F16:
      return DType::kF16;
    case Kv::DTYPE_FP8_E4M3:
      return DType::kFp8E4m3;
    default:
      return DTypeBytes(model_dtype) == DTypeBytes(activation_dtype) ? activation_dtype
                                                                     : model_dtype;
  }
}

absl::StatusOr<MemoryModel> MemoryModel::Create(const Arm& arm, const StrategySizes& sizes,
                                                int32_t chunk_tokens) {
  KVSWEEP_CHECK_GE(chunk_tokens, 1);
  ASSIGN_OR_RETURN(std::unique_ptr<KvManager> manager, MakeManager(arm, sizes));
  return MemoryModel(std::move(manager), sizes, chunk_tokens);
}

bool MemoryModel::CanRun(const RequestShape& shape) const {
  TierBytes needed = manager_->FixedBytes();
  needed += manager_->PeakBytes(shape);
  return needed.device <= sizes_.device_bytes && needed.host <= sizes_.host_bytes &&
         shape.limit() <= sizes_.max_context;
}

RequestMemory MemoryModel::Follow(const RequestShape& shape) {
  KVSWEEP_CHECK(CanRun(shape)) << shape.prompt_tokens << " + " << shape.max_tokens;
  RequestMemory memory;
  KVSWEEP_CHECK(Hold(0, shape, &memory)) << "a request whose peak fits found no memory alone";
  manager_->Release(0);
  return memory;
}

int32_t MemoryModel::FitAtOnce(const RequestShape& shape) {
  if (!CanRun(shape)) return 0;
  int32_t held = 0;
  RequestMemory memory;
  while (held < sizes_.max_sequences && Hold(held, shape, &memory)) ++held;
  for (RequestId request = 0; request < held; ++request) manager_->Release(request);
  return held;
}

bool MemoryModel::Hold(RequestId request, const RequestShape& shape, RequestMemory* memory) {
  const int32_t prompt = shape.prompt_tokens;
  int32_t tokens = std::min(chunk_tokens_, prompt);
  if (!manager_->Admit(request, shape, tokens)) return false;
  const auto grow = [&](int32_t to) {
    if (manager_->Grow(request, to)) return true;
    manager_->Release(request);
    return false;
  };
  memory->prompt_peak = manager_->RequestBytes(request);
  while (tokens < prompt) {
    tokens = std::min(tokens + chunk_tokens_, prompt);
    if (!grow(tokens)) return false;
    memory->prompt_peak = Larger(memory->prompt_peak, manager_->RequestBytes(request));
  }
  manager_->EndPrompt(request);
  memory->after_prompt = manager_->RequestBytes(request);
  // A request whose length is known ends there; a reservation for that length holds no more. The
  // last token is produced, never stored.
  const int32_t end = shape.oracle_tokens > 0 ? shape.oracle_tokens : shape.limit();
  for (; tokens < end - 1; ++tokens) {
    if (!grow(tokens + 1)) return false;
  }
  memory->at_end = manager_->RequestBytes(request);
  return true;
}

}  // namespace kvsweep
