// Reading of safetensors checkpoints, one file or several with an index.
//
// A file is: u64 little endian header length, a JSON header of that length that
// maps each tensor's name to {dtype, shape, data_offsets}, then the data. A
// checkpoint comes from outside, so nothing of it is believed: lengths are
// bounded before they are used, and offsets must tile the data part exactly (no
// overlap, no gap, nothing past the end) before a single view is given out.
// Files are mapped, not read: opening a checkpoint of 15 GB costs its headers.
#ifndef KVSWEEP_WORKER_ENGINE_SAFETENSORS_H_
#define KVSWEEP_WORKER_ENGINE_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/file.h"
#include "kernels/shapes.h"

namespace kvsweep {

// A tensor inside a mapped file. `bytes` may be misaligned for `type` and lives
// as long as the checkpoint that gave it out.
struct TensorView {
  DType type = DType::kF32;
  std::vector<int64_t> shape;      // outermost first; empty for a scalar
  std::span<const uint8_t> bytes;  // product of shape × DTypeBytes(type)
  std::string file;                // the shard's file name, for messages
};

// "[4096, 384]".
std::string ShapeText(std::span<const int64_t> shape);

// Widens `tensor` into `out` [elements], exactly: every bf16 and f16 value is
// an f32 value. REQUIRES: out.size() is the tensor's number of elements.
void WidenTensor(const TensorView& tensor, std::span<float> out);

class Checkpoint {
 public:
  // Opens the shards that `folder`/model.safetensors.index.json names when it
  // exists, else `folder`/model.safetensors. The index may only name files of
  // the folder itself, and each tensor must lie in the shard that the index
  // says. NotFound when the folder has neither; DataLoss for a file that is
  // damaged; InvalidArgument for one that is well-formed but not allowed.
  static absl::StatusOr<Checkpoint> Open(const std::string& folder);

  // The tensor of that name, or nullptr.
  const TensorView* Find(absl::string_view name) const;

  // All tensors by name, in order.
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }

 private:
  std::vector<MappedFile> files_;
  std::map<std::string, TensorView, std::less<>> tensors_;
};

// Reads the header of one whole safetensors file given as `bytes`, with views
// into it. `file_name` serves the messages and TensorView::file.
absl::StatusOr<std::map<std::string, TensorView, std::less<>>> ParseSafetensors(
    std::span<const uint8_t> bytes, absl::string_view file_name);

}  // namespace kvsweep

#endif  // KVSWEEP_WORKER_ENGINE_SAFETENSORS_H_
