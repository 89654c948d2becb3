// A backend that hands everything on to another, for tests that change one thing.
#ifndef KVSWEEP_TESTS_GPU_FORWARDING_BACKEND_H_
#define KVSWEEP_TESTS_GPU_FORWARDING_BACKEND_H_

#include <memory>
#include <utility>
#include <vector>

#include "kernels/backend.h"

namespace kvsweep {

class ForwardingBackend : public Backend {
 public:
  explicit ForwardingBackend(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

  const BackendInfo& info() const override { return inner_->info(); }
  absl::StatusOr<std::byte*> Allocate(Tier tier, uint64_t bytes) override {
    return inner_->Allocate(tier, bytes);
  }
  void Free(std::byte* memory) override { inner_->Free(memory); }
  uint64_t allocated_bytes(Tier tier) const override { return inner_->allocated_bytes(tier); }

  Event CreateEvent() override { return inner_->CreateEvent(); }
  void RecordEvent(Event event, Stream stream) override { inner_->RecordEvent(event, stream); }
  void WaitEvent(Event event, Stream stream) override { inner_->WaitEvent(event, stream); }
  absl::Status Wait(Event event) override { return inner_->Wait(event); }
  absl::Status WaitAll() override { return inner_->WaitAll(); }
  bool Reached(Event event) override { return inner_->Reached(event); }
  double ElapsedNs(Event from, Event to) const override { return inner_->ElapsedNs(from, to); }

  void BeginCapture() override { inner_->BeginCapture(); }
  absl::StatusOr<Graph> EndCapture() override { return inner_->EndCapture(); }
  void Launch(Graph graph) override { inner_->Launch(graph); }
  void DestroyGraph(Graph graph) override { inner_->DestroyGraph(graph); }

  int64_t modelled_ns() const override { return inner_->modelled_ns(); }
  uint64_t link_bytes_to_device() const override { return inner_->link_bytes_to_device(); }
  uint64_t link_bytes_to_host() const override { return inner_->link_bytes_to_host(); }

  void Enter(StepPart part) override { inner_->Enter(part); }
  void BeginProfile() override { inner_->BeginProfile(); }
  void EndProfile() override { inner_->EndProfile(); }
  absl::StatusOr<std::vector<OperationTime>> TakeProfile() override {
    return inner_->TakeProfile();
  }
  void SkipFetches(bool skip) override { inner_->SkipFetches(skip); }

  AttentionPlan PlanAttention(int32_t rows, int32_t max_tokens, int32_t kv_heads) const override {
    return inner_->PlanAttention(rows, max_tokens, kv_heads);
  }
  void Copy(void* target, const void* source, uint64_t bytes, Stream stream) override {
    inner_->Copy(target, source, bytes, stream);
  }
  void Zero(void* target, uint64_t bytes, Stream stream) override {
    inner_->Zero(target, bytes, stream);
  }
  void FillNormal(const FillNormalArgs& a, Stream s) override { inner_->FillNormal(a, s); }
  void Embed(const EmbedArgs& a, Stream s) override { inner_->Embed(a, s); }
  void Norm(const NormArgs& a, Stream s) override { inner_->Norm(a, s); }
  void Gemm(const GemmArgs& a, Stream s) override { inner_->Gemm(a, s); }
  void SiluGate(const SiluGateArgs& a, Stream s) override { inner_->SiluGate(a, s); }
  void GatedGemm(const GatedGemmArgs& a, Stream s) override { inner_->GatedGemm(a, s); }
  void Rotary(const RotaryArgs& a, Stream s) override { inner_->Rotary(a, s); }
  void TakeRows(const TakeRowsArgs& a, Stream s) override { inner_->TakeRows(a, s); }
  void Argmax(const ArgmaxArgs& a, Stream s) override { inner_->Argmax(a, s); }
  void Append(const AppendArgs& a, Stream s) override { inner_->Append(a, s); }
  void DecodeAttention(const DecodeAttentionArgs& a, Stream s) override {
    inner_->DecodeAttention(a, s);
  }
  void AppendAndAttend(const AppendAndAttendArgs& a, Stream s) override {
    inner_->AppendAndAttend(a, s);
  }
  void PrefillAttention(const PrefillAttentionArgs& a, Stream s) override {
    inner_->PrefillAttention(a, s);
  }
  void ColumnSum(const ColumnSumArgs& a, Stream s) override { inner_->ColumnSum(a, s); }
  void PruneHeavy(const PruneHeavyArgs& a, Stream s) override { inner_->PruneHeavy(a, s); }
  void EvictHeavy(const EvictHeavyArgs& a, Stream s) override { inner_->EvictHeavy(a, s); }
  void RepeatHeads(const RepeatHeadsArgs& a, Stream s) override { inner_->RepeatHeads(a, s); }
  void ProjectHeads(const ProjectHeadsArgs& a, Stream s) override { inner_->ProjectHeads(a, s); }
  void RankColumns(const RankColumnsArgs& a, Stream s) override { inner_->RankColumns(a, s); }
  void Speculate(const SpeculateArgs& a, Stream s) override { inner_->Speculate(a, s); }
  void SelectTop(const SelectTopArgs& a, Stream s) override { inner_->SelectTop(a, s); }
  void PlaceTokens(const PlaceTokensArgs& a, Stream s) override { inner_->PlaceTokens(a, s); }
  void GatherRows(const GatherRowsArgs& a, Stream s) override { inner_->GatherRows(a, s); }
  void CopyTile(const CopyTileArgs& a, Stream s) override { inner_->CopyTile(a, s); }
  void CopyBlocks(const CopyBlocksArgs& a, Stream s) override { inner_->CopyBlocks(a, s); }
  void AllReduce(const AllReduceArgs& a, Stream s) override { inner_->AllReduce(a, s); }

 private:
  std::unique_ptr<Backend> inner_;
};

}  // namespace kvsweep

#endif  // KVSWEEP_TESTS_GPU_FORWARDING_BACKEND_H_
