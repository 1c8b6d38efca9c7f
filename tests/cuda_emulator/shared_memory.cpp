// What the threads of a block do to shared memory, element by element.

#include "cuda_runtime.h"

namespace effattn::cuda::emulator {

namespace {

Access access_now(Where where) {
  const Block& block = *current->block;
  return {block.epoch, block.warps[current->index.x / kLanes].epoch, static_cast<int32_t>(current->index.x), where};
}

// Whether no barrier stands between an earlier access and one that happens now.
bool races(const Access& before, const Access& now) {
  if (before.block_epoch != now.block_epoch || before.thread == now.thread) return false;
  return before.thread / kLanes != now.thread / kLanes || before.warp_epoch == now.warp_epoch;
}

std::string element(const Span& span, uint32_t cell) { return "element " + std::to_string(cell - span.begin); }

[[noreturn]] void race(
    const Span& span, uint32_t cell, const Access& before, const char* did, const Access& now, const char* does) {
  fail("missing barrier: thread " + std::to_string(now.thread) + " " + does + " " + element(span, cell) +
       " of a shared array at " + at(now.where) + ", which thread " + std::to_string(before.thread) + " " + did +
       " at " + at(before.where));
}

void check_pending(const Span& span, uint32_t cell, const Cell& state, const char* verb, Where where) {
  if (state.pending && state.write.block_epoch >= current->block->first_epoch)
    fail(std::string(verb) + " of " + element(span, cell) + " of a shared array at " + at(where) +
         " before cp_async_wait for the copy that was started at " + at(state.write.where) + " by thread " +
         std::to_string(state.write.thread));
}

// Keeps two reads by different threads of this epoch such that whoever could race with any of the reads so far races
// with one of the two: reads from two warps, else the latest ones of the one warp.
void note_read(std::array<Access, 2>& reads, const Access& now) {
  auto& [one, two] = reads;
  if (one.block_epoch != now.block_epoch) {
    one = now;
    two = {};
  } else if (one.thread == now.thread) {
    one = now;
  } else if (two.block_epoch != now.block_epoch || two.thread == now.thread) {
    two = now;
  } else if (one.thread / kLanes == two.thread / kLanes) {
    (one.warp_epoch < two.warp_epoch ? one : two) = now;
  } else if (now.thread / kLanes == one.thread / kLanes) {
    one = now;
  } else if (now.thread / kLanes == two.thread / kLanes) {
    two = now;
  }
}

}  // namespace

uint32_t Span::check(int64_t offset, int64_t bytes, const char* verb, Where where) const {
  if (offset < begin || offset + bytes > end)
    fail(std::string("out of bounds: ") + verb + " of " + std::to_string(bytes) + " bytes at byte " +
         std::to_string(offset - begin) + " of a shared array of " + std::to_string(end - begin) + " at " + at(where));
  if (offset % bytes)
    fail(std::string("misaligned: ") + verb + " of " + std::to_string(bytes) + " bytes at " + at(where));
  return begin + (offset - begin) / cell_bytes;
}

void read(const Span& span, int64_t offset, int64_t bytes, Where where) {
  const uint32_t first = span.check(offset, bytes, "read", where);
  const uint32_t last = span.begin + (offset + bytes - 1 - span.begin) / span.cell_bytes;
  const Access now = access_now(where);
  for (uint32_t cell = first; cell <= last; ++cell) {
    Cell& state = current->block->cells[cell];
    check_pending(span, cell, state, "read", where);
    if (state.write.block_epoch < current->block->first_epoch)
      fail("read of " + element(span, cell) + " of a shared array at " + at(where) + ", which nobody has written");
    if (races(state.write, now)) race(span, cell, state.write, "wrote", now, "reads");
    note_read(state.reads, now);
  }
}

void write(const Span& span, int64_t offset, int64_t bytes, Where where) {
  const uint32_t first = span.check(offset, bytes, "write", where);
  if (bytes < span.cell_bytes)
    fail("write at " + at(where) + " of less than an element: carve the array out as the smaller type");
  const Access now = access_now(where);
  for (uint32_t cell = first; cell < first + bytes / span.cell_bytes; ++cell) {
    Cell& state = current->block->cells[cell];
    check_pending(span, cell, state, "write", where);
    if (races(state.write, now)) race(span, cell, state.write, "wrote", now, "writes");
    for (const Access& before : state.reads)
      if (races(before, now)) race(span, cell, before, "read", now, "writes");
    state.write = now;
    state.pending = false;
  }
}

Span carve(size_t& offset, size_t count, size_t element, Where where) {
  const size_t bytes = (count * element + 15) / 16 * 16;
  if (offset + bytes > current->block->shared_size)
    fail("out of shared memory: " + std::to_string(offset + bytes) + " bytes carved out at " + at(where) +
         ", launched with " + std::to_string(current->block->shared_size));
  const int64_t begin = offset;
  offset += bytes;
  return {begin, begin + static_cast<int64_t>(count * element), static_cast<int32_t>(element)};
}

// ---- Copies

void start_copy(const Span& span, int64_t offset, const void* from, bool valid, Where where) {
  if (valid) check_aligned(from, 16, where);
  write(span, offset, 16, where);
  PendingCopy copy = {static_cast<uint32_t>(offset), span.check(offset, 16, "write", where),
      static_cast<uint32_t>(16 / span.cell_bytes), {}, where};
  if (valid) memcpy(copy.data.data(), from, 16);
  for (uint32_t i = 0; i < copy.cells; ++i) current->block->cells[copy.first_cell + i].pending = true;
  current->groups.back().push_back(copy);
}

void commit_copies() { current->groups.emplace_back(); }

void wait_copies(int pending) {
  auto& groups = current->groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    for (const PendingCopy& copy : groups.front()) {
      memcpy(current->block->shared + copy.offset, copy.data.data(), 16);
      for (uint32_t i = 0; i < copy.cells; ++i) {
        Cell& state = current->block->cells[copy.first_cell + i];
        state.pending = false;
        state.write = access_now(copy.where);
      }
    }
    groups.erase(groups.begin());
  }
}

void check_aligned(const void* address, size_t bytes, Where where) {
  if (reinterpret_cast<uintptr_t>(address) % bytes)
    fail("misaligned: access of " + std::to_string(bytes) + " bytes of global memory at " + at(where));
}

}  // namespace effattn::cuda::emulator
