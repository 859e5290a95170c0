#include "emulator.h"

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstdio>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"

namespace emulator {
namespace {

constexpr std::size_t kStack = 64 * 1024;
constexpr std::size_t kSharedLimit = 48 * 1024;
constexpr int kResidentBlocks = 3;

struct Fiber;

struct Warp {
  uint64_t values[2][32];  // two, since a lane may begin the next exchange while another still reads this one
  WarpOperation operation;
  int turn = 0;
  std::vector<Fiber*> waiting;
};

struct Block {
  unsigned index;
  int unfinished;
  std::vector<Warp> warps;
  std::vector<Fiber*> waiting;
  std::vector<Fiber> fibers;
  alignas(16) unsigned char shared[kSharedLimit];
};

struct Fiber {
  Block* block;
  unsigned index;
  std::size_t shared_used = 0;
  bool started = false;
  ucontext_t first;
  jmp_buf resume;
  std::unique_ptr<char[]> stack;
};

std::mt19937_64 generator;
std::vector<Fiber*> ready;
std::vector<std::unique_ptr<char[]>> spare_stacks;
Fiber* current = nullptr;
jmp_buf scheduler;
const std::function<void()>* body = nullptr;
unsigned grid = 0;
std::string failure;
cudaError_t last = cudaSuccess;
int device = 0, devices = 2, driver = CUDART_VERSION, multiprocessors = 3;

// Back to the scheduler; returns when the fiber is picked again. Plain jumps: swapcontext is two system calls.
void leave() {
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void enter() {
  (*body)();
  Fiber* const fiber = current;
  if (--fiber->block->unfinished != 0 && fiber->block->waiting.size() == static_cast<std::size_t>(fiber->block->unfinished)) {
    fail("threads left a block whose others wait at a barrier");
  }
  _longjmp(scheduler, 2);
}

void start(Block& block, unsigned index, int threads) {
  block.index = index;
  block.unfinished = threads;
  block.warps.resize(threads / 32);
  block.fibers = std::vector<Fiber>(threads);
  for (unsigned char& byte : block.shared) byte = static_cast<unsigned char>(generator());
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = block.fibers[t];
    fiber.block = &block;
    fiber.index = t;
    if (spare_stacks.empty()) {
      fiber.stack.reset(new char[kStack]);
    } else {
      fiber.stack = std::move(spare_stacks.back());
      spare_stacks.pop_back();
    }
    getcontext(&fiber.first);
    fiber.first.uc_stack.ss_sp = fiber.stack.get();
    fiber.first.uc_stack.ss_size = kStack;
    fiber.first.uc_link = nullptr;
    makecontext(&fiber.first, enter, 0);
    ready.push_back(&fiber);
  }
}

void go_on(Fiber* fiber) {
  current = fiber;
  const int reason = _setjmp(scheduler);
  if (reason == 0) {
    if (fiber->started) _longjmp(fiber->resume, 1);
    fiber->started = true;
    setcontext(&fiber->first);
  }
  if (reason == 2) spare_stacks.push_back(std::move(current->stack));
}

}  // namespace

Index thread_index() { return {current->index}; }
Index block_index() { return {current->block->index}; }
Index grid_size() { return {grid}; }

void fail(const char* what) {
  if (failure.empty()) failure = what;
  _longjmp(scheduler, 3);
}

void* shared_memory(std::size_t bytes) {
  void* const memory = current->block->shared + current->shared_used;
  current->shared_used += (bytes + 15) / 16 * 16;
  if (current->shared_used > kSharedLimit) fail("more shared memory than a block has");
  return memory;
}

void barrier() {
  Block& block = *current->block;
  if (block.waiting.size() + 1 < block.fibers.size()) {
    block.waiting.push_back(current);
    return leave();
  }
  ready.insert(ready.end(), block.waiting.begin(), block.waiting.end());
  block.waiting.clear();
  maybe_preempt();
}

void maybe_preempt() {
  if (generator() % 4 != 0) return;
  ready.push_back(current);
  leave();
}

const uint64_t* exchange(WarpOperation operation, uint64_t value, unsigned mask) {
  Warp& warp = current->block->warps[current->index / 32];
  const int turn = warp.turn;
  if (mask != 0xffffffffu) fail("a warp operation with a partial mask");
  if (!warp.waiting.empty() && warp.operation != operation) fail("the lanes of a warp disagree on what to do");
  warp.operation = operation;
  warp.values[turn][current->index % 32] = value;
  if (warp.waiting.size() + 1 < 32) {
    warp.waiting.push_back(current);
    leave();
  } else {
    ready.insert(ready.end(), warp.waiting.begin(), warp.waiting.end());
    warp.waiting.clear();
    warp.turn ^= 1;
    maybe_preempt();
  }
  return warp.values[turn];
}

void run(int64_t blocks, int threads, const std::function<void()>& kernel) {
  if (threads % 32 != 0 || blocks < 1) {
    last = cudaErrorLaunchFailure;
    failure = "a grid without blocks, or a block without whole warps";
    return;
  }
  body = &kernel;
  grid = static_cast<unsigned>(blocks);
  ready.clear();
  failure.clear();
  std::vector<unsigned> order(blocks);
  for (unsigned b = 0; b < order.size(); ++b) order[b] = b;
  std::shuffle(order.begin(), order.end(), generator);
  std::deque<std::unique_ptr<Block>> resident;
  // Half of the grids prefer the fiber that became ready last: a warp then runs ahead of the others as far as it may.
  const bool newest_first = generator() % 2 == 0;
  while (failure.empty()) {
    while (resident.size() < kResidentBlocks && !order.empty()) {
      resident.emplace_back(new Block);
      start(*resident.back(), order.back(), threads);
      order.pop_back();
    }
    if (ready.empty()) {
      if (!resident.empty()) failure = "deadlock: threads wait for others that never come";
      break;
    }
    if (!newest_first || generator() % 8 == 0) std::swap(ready[generator() % ready.size()], ready.back());
    Fiber* const next = ready.back();
    ready.pop_back();
    Block* const block = next->block;
    go_on(next);
    if (block->unfinished == 0) {
      resident.erase(std::find_if(resident.begin(), resident.end(), [=](const auto& b) { return b.get() == block; }));
    }
  }
  if (!failure.empty()) last = cudaErrorLaunchFailure;
}

}  // namespace emulator

using namespace emulator;

float ft::half_bits_to_float(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float sign = bits >> 15 ? -1.0f : 1.0f;
  if (exponent == 31) return fraction ? std::nanf("") : sign * INFINITY;
  return sign * (exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24) : std::ldexp(1024.0f + fraction, exponent - 25));
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorNoDevice) return "no CUDA-capable device is detected";
  return error == cudaErrorInvalidDevice ? "invalid device ordinal" : failure.c_str();
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorLaunchFailure ? "cudaErrorLaunchFailure" : "cudaErrorInvalidDevice";
}
cudaError_t cudaGetDeviceCount(int* count) {
  *count = devices;
  return devices > 0 ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = driver;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* which) {
  *which = device;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int which) {
  if (which < 0 || which >= devices) return cudaErrorInvalidDevice;
  device = which;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? multiprocessors : 9;
  return cudaSuccess;
}

// The order of threads and blocks from here on, and how many blocks a grid has (one a multiprocessor).
extern "C" __attribute__((visibility("default"))) void emulator_schedule(uint64_t seed, int32_t blocks) {
  generator.seed(seed);
  multiprocessors = blocks;
}

extern "C" __attribute__((visibility("default"))) void emulator_machine(int32_t device_count, int32_t driver_version) {
  devices = device_count;
  driver = driver_version;
}

extern "C" __attribute__((visibility("default"))) int32_t emulator_current_device() { return device; }
