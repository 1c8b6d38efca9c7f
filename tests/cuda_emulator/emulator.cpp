// The fibers, and who runs when.

#include <dlfcn.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <thread>
#include <utility>

#include "cuda_runtime.h"

namespace effattn::cuda::emulator {

constinit thread_local Thread* current = nullptr;
std::string (*describe_address)(const void*) = nullptr;

namespace {

constexpr size_t kStack = 128 * 1024, kGuard = 64 * 1024;  // multiples of every page size
constexpr size_t kMaxThreads = 1024, kMaxShared = 101376;  // the last: sm_86, sm_89 and sm_120 have no more

// ---- Fibers

#ifdef __x86_64__

// Saves on the stack that it leaves what a function must preserve, and where that ends in *from.
extern "C" void effattn_switch_context(void** from, void* to);
asm(R"(
.text
.type effattn_switch_context, @function
effattn_switch_context:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effattn_switch_context, . - effattn_switch_context
)");

struct Context {
  void* top;
  void prepare(std::byte* stack, void (*entry)()) {
    void** const end = reinterpret_cast<void**>(stack + kStack);
    std::fill(end - 8, end, nullptr);
    end[-2] = reinterpret_cast<void*>(entry);  // above six registers; end[-1] is where it would return to
    top = end - 8;
  }
  void switch_to(Context& other) { effattn_switch_context(&top, other.top); }
};

#else

struct Context {
  ucontext_t state;
  void prepare(std::byte* stack, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = stack;
    state.uc_stack.ss_size = kStack;
    makecontext(&state, entry, 0);
  }
  void switch_to(Context& other) { swapcontext(&state, &other.state); }
};

#endif

// ---- Blocks

uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
  x = (x ^ x >> 27) * 0x94d049bb133111eb;
  return x ^ x >> 31;
}

struct Random {
  uint64_t state;
  uint64_t below(uint64_t limit) { return mix(state++) % limit; }
};

struct Launch {
  dim3 grid, block;
  size_t shared;
  const std::function<void()>& kernel;
  uint64_t seed;
  std::vector<uint32_t> order;  // of the blocks
  std::atomic<size_t> next = 0;
  std::mutex mutex;
  std::exception_ptr error;
};

// Runs blocks one after the other; keeps its stacks and its shared memory for the next launch.
class Worker {
 public:
  Worker() {
    stacks_ = static_cast<std::byte*>(
        mmap(nullptr, kMaxThreads * (kStack + kGuard), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stacks_ == MAP_FAILED) throw std::bad_alloc();
  }

  static Worker& running() { return *running_; }

  void work(Launch& launch) {
    const SignalStack signal_stack(signal_stack_);
    running_ = this;
    for (size_t i; (i = launch.next++) < launch.order.size();) {
      try {
        run_block(launch, launch.order[i]);
      } catch (...) {
        launch.next = launch.order.size();
        const std::lock_guard lock(launch.mutex);
        if (!launch.error) launch.error = std::current_exception();
      }
    }
    running_ = nullptr;
  }

  // The next to run is drawn from all that are ready.
  void ready(int thread) { block_.ready.push_back(thread); }

  // From inside a fiber: lets others run until one of them makes this thread ready.
  void wait() { contexts_[current->index.x].switch_to(scheduler_); }

  // From inside a fiber: ends the block. The fibers are not unwound.
  [[noreturn]] void abandon(std::exception_ptr error) {
    error_ = std::move(error);
    wait();
    std::abort();
  }

  static void on_fault(int, siginfo_t* info, void* context);

 private:
  // A fault on a full fiber stack is handled on another.
  struct SignalStack {
    template <class Memory>
    explicit SignalStack(Memory& memory) {
      stack_t wanted = {};
      wanted.ss_sp = memory.data();
      wanted.ss_size = memory.size();
      sigaltstack(&wanted, &previous);
    }
    ~SignalStack() { sigaltstack(&previous, nullptr); }
    stack_t previous;
  };

  struct CurrentReset {
    ~CurrentReset() { current = nullptr; }
  };

  static void enter() {
    Worker& worker = running();
    std::exception_ptr error;
    try {
      worker.launch_->kernel();
    } catch (...) {
      error = std::current_exception();
    }
    if (error) worker.abandon(std::move(error));
    current->exited = true;
    worker.wait();
    std::abort();
  }

  void run_block(Launch& launch, uint32_t number) {
    const CurrentReset reset;
    prepare(launch, number);
    Random random{mix(mix(launch.seed) + number)};
    while (!block_.ready.empty() && !error_) {
      std::swap(block_.ready[random.below(block_.ready.size())], block_.ready.back());
      current = &block_.threads[block_.ready.back()];
      block_.ready.pop_back();
      scheduler_.switch_to(contexts_[current->index.x]);
    }
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
    check_finished();
  }

  void prepare(Launch& launch, uint32_t number) {
    const int threads = launch.block.x;
    const dim3 grid = launch.grid;
    launch_ = &launch;
    block_.index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    block_.size = launch.block;
    block_.grid = grid;
    block_.at_barrier = 0;
    block_.first_epoch = ++block_.epoch;
    shared_.assign(launch.shared + 128, std::byte{0xff});
    block_.shared = shared_.data() + (-reinterpret_cast<uintptr_t>(shared_.data()) & 127);
    block_.shared_size = launch.shared;
    if (block_.cells.size() < launch.shared) block_.cells.resize(launch.shared);
    block_.warps.resize(threads / kLanes);
    for (Warp& warp : block_.warps) warp.arrived = 0;
    block_.threads.assign(threads, {});
    contexts_.resize(threads);
    block_.ready.clear();
    for (int i = 0; i < threads; ++i) {
      Thread& thread = block_.threads[i];
      thread.index = {static_cast<unsigned>(i), 0, 0};
      thread.block = &block_;
      thread.groups.resize(1);
      std::byte* const stack = stacks_ + i * (kStack + kGuard) + kGuard;
      if (i == usable_stacks_) {
        if (mprotect(stack, kStack, PROT_READ | PROT_WRITE)) throw std::bad_alloc();
        ++usable_stacks_;
      }
      contexts_[i].prepare(stack, enter);
      ready(i);
    }
  }

  // When nobody can go on, everybody must have exited.
  void check_finished();

  inline static constinit thread_local Worker* running_ = nullptr;

  Launch* launch_ = nullptr;
  Block block_;
  std::vector<Context> contexts_;
  Context scheduler_;
  std::exception_ptr error_;
  std::vector<std::byte> shared_;
  std::byte* stacks_;
  int usable_stacks_ = 0;
  std::array<std::byte, 64 * 1024> signal_stack_;
};

// ---- What can go wrong with control flow

bool same(const Where& one, const Where& other) {
  return one.line() == other.line() && one.column() == other.column() && !strcmp(one.file_name(), other.file_name());
}

std::string situation(const Thread& thread) {
  const std::string name = "thread " + std::to_string(thread.index.x);
  if (thread.exited) return name + " has exited";
  return name + " waits in " + thread.waits_for + " at " + at(thread.waits_at);
}

// Of two threads that are not at one place where both should be.
[[noreturn]] void diverged(const Thread& one, const Thread& other) {
  const bool barrier = !strcmp(one.waits_for, "sync_block");
  fail(std::string(barrier ? "divergent barrier: " : "divergent warp collective: ") + situation(one) + ", " +
       situation(other));
}

// Where a machine instruction comes from: the innermost line that is not a twin's.
std::string line_of(void* instruction) {
  Dl_info library;
  if (!dladdr(instruction, &library)) return "?";
  char command[4096];
  snprintf(command, sizeof(command), "addr2line -i -e '%s' %#zx 2>/dev/null", library.dli_fname,
      reinterpret_cast<size_t>(instruction) - reinterpret_cast<size_t>(library.dli_fbase));
  FILE* const output = popen(command, "r");
  if (!output) return "?";
  std::string found = "?";
  for (char line[4096]; fgets(line, sizeof(line), output);) {
    std::string place = line;
    place.resize(place.find_first_of(" \n"));
    const bool twin = place.find("device_twins.h") != place.npos || place.starts_with("/usr/");
    if (found == "?" && !twin) found = place.substr(place.rfind('/') + 1);
  }
  pclose(output);
  return found;
}

struct sigaction previous_action;

// Others may have put their handler above ours since the last launch.
void install_fault_handler() {
  struct sigaction installed;
  sigaction(SIGSEGV, nullptr, &installed);
  if (installed.sa_sigaction == Worker::on_fault) return;
  previous_action = installed;
  struct sigaction action = {};
  action.sa_sigaction = Worker::on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
  sigaction(SIGSEGV, &action, nullptr);
}

void Worker::check_finished() {
  // Warps first: threads wait at a barrier for lanes that never come out of a collective.
  for (const bool barrier : {false, true}) {
    for (Thread& thread : block_.threads) {
      if (thread.exited || barrier != !strcmp(thread.waits_for, "sync_block")) continue;
      current = &thread;
      const int begin = barrier ? 0 : thread.index.x / kLanes * kLanes;
      const int end = barrier ? static_cast<int>(block_.threads.size()) : begin + kLanes;
      for (int i = begin; i < end; ++i) {
        const Thread& other = block_.threads[i];
        if (other.exited || strcmp(other.waits_for, thread.waits_for)) diverged(thread, other);
      }
    }
  }
}

void Worker::on_fault(int, siginfo_t* info, void* context) {
  if (current == nullptr) {  // not a kernel's doing: the instruction faults again, for whoever was there before
    sigaction(SIGSEGV, &previous_action, nullptr);
    return;
  }
  const auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
#ifdef __x86_64__
  void* const instruction = reinterpret_cast<void*>(registers.gregs[REG_RIP]);
  const char* const verb = registers.gregs[REG_ERR] & 2 ? "write" : "read";
#else
  void* const instruction = reinterpret_cast<void*>(registers.pc);
  const char* const verb = "access";
#endif
  Worker& worker = running();
  const std::byte* const address = static_cast<std::byte*>(info->si_addr);
  std::exception_ptr error;
  try {
    if (address >= worker.stacks_ && address < worker.stacks_ + kMaxThreads * (kStack + kGuard))
      fail("stack overflow at " + line_of(instruction) + ": a thread has " + std::to_string(kStack) + " bytes");
    fail(std::string("out of bounds: ") + verb + " of global memory at " + line_of(instruction) +
         (describe_address ? describe_address(address) : ""));
  } catch (...) {
    error = std::current_exception();
  }
  worker.abandon(std::move(error));
}

}  // namespace

void fail(const std::string& message) {
  const uint3 block = current->block->index;
  throw std::runtime_error("CUDA emulator: " + message + " (thread " + std::to_string(current->index.x) + ", block " +
                           std::to_string(block.x) + " " + std::to_string(block.y) + " " + std::to_string(block.z) +
                           ")");
}

std::string at(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(where.line());
}

size_t shared_memory_limit() {
  const char* const bytes = getenv("EFFATTN_EMULATOR_SHARED");
  return bytes != nullptr ? strtoull(bytes, nullptr, 10) : kMaxShared;
}

void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const size_t blocks = static_cast<size_t>(grid.x) * grid.y * grid.z;
  if (blocks == 0) return;
  if (block.x == 0 || block.x % kLanes || block.x > kMaxThreads || block.y != 1 || block.z != 1)
    throw std::runtime_error("CUDA emulator: a block of " + std::to_string(block.x) + " x " + std::to_string(block.y) +
                             " x " + std::to_string(block.z) + " threads is not one-dimensional and whole warps");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("CUDA emulator: a grid has at most 65535 in y and z");
  if (shared > shared_memory_limit())
    throw std::runtime_error("CUDA emulator: " + std::to_string(shared) + " bytes of shared memory, some chips have " +
                             std::to_string(shared_memory_limit()));

  const char* const seed = getenv("EFFATTN_EMULATOR_SEED");
  Launch launch{grid, block, shared, kernel, seed ? strtoull(seed, nullptr, 10) : 0, {}, {}, {}, {}};
  launch.order.resize(blocks);
  for (size_t i = 0; i < blocks; ++i) launch.order[i] = i;
  Random random{mix(launch.seed)};
  for (size_t i = blocks; i > 1; --i) std::swap(launch.order[i - 1], launch.order[random.below(i)]);

  static std::mutex mutex;
  static std::vector<std::unique_ptr<Worker>> idle;
  const auto work = [&launch] {
    std::unique_ptr<Worker> worker;
    {
      const std::lock_guard lock(mutex);
      if (!idle.empty()) {
        worker = std::move(idle.back());
        idle.pop_back();
      }
    }
    if (!worker) worker = std::make_unique<Worker>();
    worker->work(launch);
    const std::lock_guard lock(mutex);
    idle.push_back(std::move(worker));
  };
  install_fault_handler();
  std::vector<std::thread> helpers(std::min<size_t>(blocks, std::max(1u, std::thread::hardware_concurrency())) - 1);
  for (std::thread& helper : helpers) helper = std::thread(work);
  work();
  for (std::thread& helper : helpers) helper.join();
  if (launch.error) std::rethrow_exception(launch.error);
}

// ---- Barriers and collectives

void sync_block(Where where) {
  Block& block = *current->block;
  current->waits_for = "sync_block";
  current->waits_at = where;
  if (block.at_barrier == 0) block.first_at_barrier = current->index.x;
  const Thread& first = block.threads[block.first_at_barrier];
  if (!same(first.waits_at, where)) diverged(*current, first);
  if (++block.at_barrier < static_cast<int>(block.threads.size())) return Worker::running().wait();
  block.at_barrier = 0;
  ++block.epoch;
  for (const Thread& thread : block.threads)
    if (&thread != current) Worker::running().ready(thread.index.x);
}

const std::byte* exchange(const void* mine, size_t size, const char* name, Where where) {
  Block& block = *current->block;
  const int lane = current->index.x % kLanes, base = current->index.x - lane;
  Warp& warp = block.warps[base / kLanes];
  current->waits_for = name;
  current->waits_at = where;
  if (warp.arrived == 0) warp.first_arrived = current->index.x;
  const Thread& first = block.threads[warp.first_arrived];
  if (!same(first.waits_at, where)) diverged(*current, first);
  std::byte(&slots)[kLanes][64] = warp.slots[warp.number % 2];
  memcpy(slots[lane], mine, size);
  if (++warp.arrived < kLanes) {
    Worker::running().wait();
    return slots[0];
  }
  warp.arrived = 0;
  ++warp.number;  // two collectives later these slots are written again: by then all lanes have read them
  for (int i = base; i < base + kLanes; ++i)
    if (i != base + lane) Worker::running().ready(i);
  return slots[0];
}

void sync_warp(Where where) {
  Warp& warp = current->block->warps[current->index.x / kLanes];
  const uint32_t epoch = warp.epoch;
  exchange(&epoch, sizeof(epoch), "sync_warp", where);
  warp.epoch = epoch + 1;  // every lane writes the same
}

}  // namespace effattn::cuda::emulator
