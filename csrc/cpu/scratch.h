// Memory that a thread keeps between calls, so that a call on small tensors allocates nothing, and the way work reaches
// the threads.
#pragma once

#include <stdlib.h>

#include <new>

#include "simd.h"

namespace effattn::EFFATTN_ISA {

class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(data_); }

  template <class T>
  T* reserve(int64_t count) {
    const size_t wanted = static_cast<size_t>(count) * sizeof(T);
    if (wanted > bytes_) {
      free(data_);
      bytes_ = round_up(static_cast<int64_t>(wanted + wanted / 4), 4096);
      data_ = aligned_alloc(64, bytes_);
      if (!data_) {
        bytes_ = 0;
        throw std::bad_alloc();
      }
    }
    return static_cast<T*>(data_);
  }

  // Large sequences give their memory back.
  void trim() {
    if (bytes_ > (size_t{16} << 20)) {
      free(data_);
      data_ = nullptr;
      bytes_ = 0;
    }
  }

 private:
  void* data_ = nullptr;
  size_t bytes_ = 0;
};

// Splits items over the caller's threads, or runs them here when a hop to the pool would cost more than it saves.
inline void run_items(const Runtime& runtime, int64_t items, double flops, RangeFunction function, void* context) {
  constexpr double kWorthAHop = 1e6;
  if (items == 0) return;
  if (runtime.threads <= 1 || items == 1 || flops < kWorthAHop)
    function(0, items, context);
  else
    runtime.parallel_for(0, items, 1, function, context);
}

// The same with body(begin, end).
template <class Body>
EFFATTN_INLINE void for_items(const Runtime& runtime, int64_t items, double flops, const Body& body) {
  const auto range = [](int64_t begin, int64_t end, void* context) {
    (*static_cast<const Body*>(context))(begin, end);
  };
  run_items(runtime, items, flops, range, const_cast<Body*>(&body));
}

}  // namespace effattn::EFFATTN_ISA
