// While it is on, every CPU tensor that torch allocates, here or in a binding, ends at an unmapped page: an access past
// the end faults at once, and the emulator names the line. The bytes between the last element and the page (fewer than
// 16, so that the data are aligned as vector accesses want) and those in front are NaNs in every floating type, and
// looked at again when the tensor goes. Fresh tensors hold NaNs as well.

#include <c10/core/CPUAllocator.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime.h"

namespace {

constexpr int kFill = 0xff;

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

struct Guarded {
  std::byte* body;  // the mapped pages; one page to either side is not
  std::byte* data;
  size_t bytes;

  static Guarded allocate(size_t bytes) {
    const size_t page = sysconf(_SC_PAGESIZE), size = round_up(bytes, page);
    void* const all = mmap(nullptr, size + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(all != MAP_FAILED, "no memory for a tensor between guard pages");
    std::byte* const body = static_cast<std::byte*>(all) + page;
    TORCH_CHECK(mprotect(body, size, PROT_READ | PROT_WRITE) == 0);
    memset(body, kFill, size);
    return {body, body + size - round_up(bytes, 16), bytes};
  }

  size_t size() const { return round_up(bytes, sysconf(_SC_PAGESIZE)); }

  void release() const {
    const size_t page = sysconf(_SC_PAGESIZE);
    munmap(body - page, size() + 2 * page);
  }

  // Which bytes around the data have been written to, or nothing.
  std::string damage() const {
    const auto clean = [](std::byte byte) { return byte == std::byte{kFill}; };
    std::byte* const end = body + size();
    if (!std::all_of(body, data, clean)) return "before the start of a tensor of " + std::to_string(bytes) + " bytes; ";
    if (!std::all_of(data + bytes, end, clean))
      return "past the end of a tensor of " + std::to_string(bytes) + " bytes; ";
    return {};
  }
};

std::mutex mutex;
std::map<const void*, Guarded> live;  // by address of the data
std::string damage;

void release(void* data) {
  if (!data) return;
  const std::lock_guard lock(mutex);
  const auto found = live.find(data);
  damage += found->second.damage();
  found->second.release();
  live.erase(found);
}

struct GuardingAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, release, c10::kCPU};
    const Guarded tensor = Guarded::allocate(bytes);
    const std::lock_guard lock(mutex);
    live[tensor.data] = tensor;
    return {tensor.data, tensor.data, release, c10::kCPU};
  }
  c10::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
};

std::string describe(const void* address) {
  const std::lock_guard lock(mutex);
  const auto* const byte = static_cast<const std::byte*>(address);
  const long page = sysconf(_SC_PAGESIZE);
  for (const auto& [data, tensor] : live) {
    if (byte < tensor.body - page || byte >= tensor.body + tensor.size() + page) continue;
    const long offset = byte - tensor.data, past = offset - static_cast<long>(tensor.bytes);
    return ", " + std::to_string(past >= 0 ? past : -offset) + (past >= 0 ? " bytes past the end" : " bytes before") +
           " of a tensor of " + std::to_string(tensor.bytes) + " bytes";
  }
  return {};
}

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

EXPORTED void effattn_guard_pages(bool on) {
  static GuardingAllocator guarding;
  static c10::Allocator* ordinary;
  if (on) ordinary = c10::GetCPUAllocator();
  c10::SetCPUAllocator(on ? &guarding : ordinary, 255);
  effattn::cuda::emulator::describe_address = describe;
}

// What was written outside of tensors since the last call; empty if nothing was.
EXPORTED const char* effattn_guard_page_damage() {
  static std::string report;
  const std::lock_guard lock(mutex);
  report = std::move(damage);
  damage.clear();
  for (const auto& [data, tensor] : live) report += tensor.damage();
  return report.c_str();
}
