// The memory under panels and activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <span>
#include <vector>

namespace nearfar {

// Bytes that begin at a multiple of 64: owned and not initialised (large ones ask for huge pages),
// or somebody else's, such as a mapped file's, which are read only.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size);
  // Stands on `bytes`, which must outlive it.  Throws std::invalid_argument unless they begin at a
  // multiple of 64.
  explicit AlignedBuffer(std::span<const uint8_t> bytes);

  uint8_t* data() { return data_; }  // of borrowed bytes, nothing may be written
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  struct Free {
    size_t alignment;
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t[], Free> owned_;
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Many buffers of one life, beside each other in huge pages: a buffer of less than one has none of
// its own.  Any thread.
class HugeArena {
 public:
  // The same bytes in the arena, which must outlive it.
  AlignedBuffer moved(AlignedBuffer from);

 private:
  std::mutex mutex_;
  std::vector<AlignedBuffer> chunks_;
  size_t used_ = 0;  // of the last chunk
};

// Leaves new numbers as they are: of a large vector, only what is written takes memory.
template <typename T>
struct Unset : std::allocator<T> {
  template <typename U>
  struct rebind {
    using other = Unset<U>;
  };
  template <typename U>
  void construct(U* p) noexcept {
    ::new (static_cast<void*>(p)) U;
  }
  using std::allocator<T>::allocator;
};
using ScratchRows = std::vector<float, Unset<float>>;

}  // namespace nearfar
