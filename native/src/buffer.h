// The memory under panels and activations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace nearfar {

// Bytes, 64-byte aligned and not initialised; large buffers ask for huge pages.
class AlignedBuffer {
 public:
  AlignedBuffer() = default;
  explicit AlignedBuffer(size_t size);
  uint8_t* data() { return data_.get(); }
  const uint8_t* data() const { return data_.get(); }
  size_t size() const { return size_; }

 private:
  struct Free {
    size_t alignment;
    void operator()(uint8_t* p) const;
  };
  std::unique_ptr<uint8_t[], Free> data_;
  size_t size_ = 0;
};

}  // namespace nearfar
