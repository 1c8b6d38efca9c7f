// Runs the threads of a CUDA block as fibers and watches what they do to shared memory.
//
// Two accesses of one element of shared memory by different threads, at least one a write, must be ordered: by a
// sync_block, or within a warp by a sync_warp. Each element remembers its last write and up to two reads since, so that
// no unordered pair escapes, in whatever order the fibers ran: of three reads by different threads, two decide. Threads
// run in an order shuffled by EFFATTN_EMULATOR_SEED all the same, for what does not pass through shared memory.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>
#include <vector>

namespace effattn::cuda::emulator {

using Where = std::source_location;

inline constexpr int kLanes = 32;

// An access of one element of shared memory. Epochs count barriers; they only grow, also from block to block.
struct Access {
  uint32_t block_epoch = 0;
  uint32_t warp_epoch = 0;
  int32_t thread = -1;
  Where where;
};

struct Cell {
  Access write;
  std::array<Access, 2> reads;
  bool pending = false;  // a cp.async of it is under way
};

struct Block;

struct PendingCopy {
  uint32_t offset;
  uint32_t first_cell, cells;
  std::array<std::byte, 16> data;
  Where where;
};

struct Thread {
  uint3 index;
  Block* block;
  std::vector<std::vector<PendingCopy>> groups;  // cp.async groups under way; the last one is open
  Where waits_at;
  const char* waits_for;  // the collective that it is in, or was in last
  bool exited;
};

struct Warp {
  alignas(16) std::byte slots[2][kLanes][64];  // what the lanes bring to a collective, by its number's parity
  int arrived, first_arrived;
  uint32_t number, epoch;  // of collectives, of sync_warps
};

struct Block {
  uint3 index;
  dim3 size, grid;
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  std::vector<int> ready;
  int at_barrier, first_at_barrier;
  uint32_t epoch = 0, first_epoch;  // those before first_epoch belong to earlier blocks
  size_t shared_size;
  std::byte* shared;        // 128-byte aligned
  std::vector<Cell> cells;  // one per byte, of which an array of wider elements uses the first ones
};

extern constinit thread_local Thread* current;  // null outside kernels

// Says of an address, for the message of a fault, in or near which tensor it lies; null: nobody knows.
extern std::string (*describe_address)(const void* address);

// Ends the launch with a message that names the block.
[[noreturn]] void fail(const std::string& message);
std::string at(const Where& where);

// Bytes that a block may ask for: what every chip has, or EFFATTN_EMULATOR_SHARED (A100: 166912, H200: 232448).
size_t shared_memory_limit();

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel);
void sync_block(Where where);
void sync_warp(Where where);

// A warp collective: brings `size` bytes, at most 64, and returns those of all lanes, 64 apart.
const std::byte* exchange(const void* mine, size_t size, const char* name, Where where);

template <class T>
struct Lanes {
  const std::byte* slots;
  T operator[](int lane) const {
    T value;
    memcpy(&value, slots + 64 * lane, sizeof(T));
    return value;
  }
};

template <class T>
Lanes<T> exchange(const T& mine, const char* name, Where where) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 64);
  return {exchange(&mine, sizeof(T), name, where)};
}

// Part of shared memory, in bytes from its start; a cell is an element of the type it was carved out with.
struct Span {
  int64_t begin = 0, end = 0;
  int32_t cell_bytes = 1;

  // The first cell of an access that has been checked to lie inside and to be aligned to its size.
  uint32_t check(int64_t offset, int64_t bytes, const char* verb, Where where) const;
};

void read(const Span& span, int64_t offset, int64_t bytes, Where where);
void write(const Span& span, int64_t offset, int64_t bytes, Where where);

Span carve(size_t& offset, size_t count, size_t element, Where where);
void start_copy(const Span& span, int64_t offset, const void* from, bool valid, Where where);
void commit_copies();
void wait_copies(int pending);
void check_aligned(const void* address, size_t bytes, Where where);

}  // namespace effattn::cuda::emulator
