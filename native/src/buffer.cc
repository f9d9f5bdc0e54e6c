#include "buffer.h"

#include <cstring>
#include <new>
#include <stdexcept>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace nearfar {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = 16 * kHugePage;

}  // namespace

void AlignedBuffer::Free::operator()(uint8_t* p) const {
  ::operator delete(p, std::align_val_t{alignment});
}

AlignedBuffer::AlignedBuffer(size_t size) : size_(size) {
  const size_t alignment = size >= kHugePage ? kHugePage : kCacheLine;
  auto* p = static_cast<uint8_t*>(::operator new(size, std::align_val_t{alignment}));
  owned_ = {p, Free{alignment}};
  data_ = p;
#if defined(__linux__)
  // Whole huge pages only: a tail would take one of its own and cost up to 2 MiB a matrix.
  if (alignment == kHugePage) madvise(p, size / kHugePage * kHugePage, MADV_HUGEPAGE);
#endif
}

AlignedBuffer::AlignedBuffer(std::span<const uint8_t> bytes)
    : data_(const_cast<uint8_t*>(bytes.data())), size_(bytes.size()) {
  if (reinterpret_cast<uintptr_t>(data_) % kCacheLine != 0) {
    throw std::invalid_argument("borrowed bytes: expected them to begin at a multiple of 64");
  }
}

AlignedBuffer HugeArena::moved(AlignedBuffer from) {
  if (from.size() > kChunk / 2) return from;
  uint8_t* to;
  {
    const std::lock_guard lock(mutex_);
    const size_t size = (from.size() + kCacheLine - 1) / kCacheLine * kCacheLine;
    if (chunks_.empty() || used_ + size > kChunk) {
      chunks_.emplace_back(kChunk);
      used_ = 0;
    }
    to = chunks_.back().data() + used_;
    used_ += size;
  }
  std::memcpy(to, from.data(), from.size());
  return AlignedBuffer(std::span<const uint8_t>(to, from.size()));
}

}  // namespace nearfar
