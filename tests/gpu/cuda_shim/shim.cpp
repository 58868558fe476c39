// Runs the blocks of a launch one after another (the blocks of a cluster together), their threads as fibers.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <memory>
#include <random>
#include <vector>

#include "cuda_runtime.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace shim {

Settings settings;

namespace {

enum class State { READY, BLOCK, WARP, CLUSTER, DONE };

constexpr size_t STACK = 64 * 1024;

struct Block {
  uint3 index;
  std::unique_ptr<unsigned char[]> shared;
  size_t running;
};

struct Fiber {
  State state;
  unsigned thread;
  Block* block;
  bool started;
  int arrivals;  // at the cluster's barrier
  float value;   // of a shuffle: given, then received
  int from;
  unsigned mask;
  jmp_buf resume;
  ucontext_t entry;
};

jmp_buf scheduler;
ucontext_t entered_from;
Fiber* current;
const std::function<void()>* body;
size_t shared_bytes;
std::vector<Block>* cluster;
int cluster_phase;
std::vector<std::unique_ptr<unsigned char[]>> stacks;

void enter() {
  (*body)();
  current->state = State::DONE;
  if (--current->block->running == 0) std::memset(current->block->shared.get(), 0xFF, shared_bytes);
  _longjmp(scheduler, 1);
}

void wait(State state) {
  current->state = state;
  if (_setjmp(current->resume) == 0) _longjmp(scheduler, 1);
}

void resume(Fiber& fiber, unsigned char* stack) {
  current = &fiber;
  threadIdx = {fiber.thread, 0, 0};
  blockIdx = fiber.block->index;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = stack;
  fiber.entry.uc_stack.ss_size = STACK;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, enter, 0);
  swapcontext(&entered_from, &fiber.entry);
}

// Lets go the threads first .. last if all of them wait in `state`.
bool release(std::vector<Fiber>& fibers, size_t first, size_t last, State state) {
  for (size_t i = first; i < last; ++i) {
    if (fibers[i].state != state) return false;
  }
  if (state == State::WARP) {
    std::vector<float> given;
    for (size_t i = first; i < last; ++i) given.push_back(fibers[i].value);
    for (size_t i = first; i < last; ++i) {
      if (fibers[i].mask != 0xFFFFFFFFu || given.size() != 32) return false;
      fibers[i].value = given[fibers[i].from];
    }
  }
  for (size_t i = first; i < last; ++i) fibers[i].state = State::READY;
  return true;
}

bool release_cluster(std::vector<Fiber>& fibers) {
  for (const Fiber& fiber : fibers) {
    if (fiber.arrivals <= cluster_phase) return false;
  }
  ++cluster_phase;
  for (Fiber& fiber : fibers) {
    if (fiber.state == State::CLUSTER) fiber.state = State::READY;
  }
  return true;
}

std::vector<size_t> ordered(size_t count, unsigned seed) {
  std::vector<size_t> order(count);
  for (size_t i = 0; i < count; ++i) order[i] = settings.order == Order::REVERSE ? count - 1 - i : i;
  if (settings.order == Order::RANDOM) std::shuffle(order.begin(), order.end(), std::mt19937(seed));
  return order;
}

// Returns the number of threads that wait for one another forever.
size_t run(std::vector<Block>& blocks, size_t threads) {
  std::vector<Fiber> fibers(blocks.size() * threads);
  for (size_t i = 0; i < fibers.size(); ++i) {
    fibers[i].state = State::READY;
    fibers[i].thread = static_cast<unsigned>(i % threads);
    fibers[i].block = &blocks[i / threads];
  }
  while (stacks.size() < fibers.size()) stacks.emplace_back(new unsigned char[STACK]);
  cluster = &blocks;
  cluster_phase = 0;
  for (unsigned round = 0;; ++round) {
    const Block* ahead = nullptr;
    for (const size_t i : ordered(fibers.size(), round)) {
      if (fibers[i].state != State::READY) continue;
      if (settings.order == Order::REVERSE && ahead != nullptr && ahead != fibers[i].block) break;
      ahead = fibers[i].block;
      resume(fibers[i], stacks[i].get());
    }
    bool released = release_cluster(fibers);
    for (size_t first = 0; first < fibers.size(); first += threads) {
      released |= release(fibers, first, first + threads, State::BLOCK);
      for (size_t warp = first; warp < first + threads; warp += 32) {
        released |= release(fibers, warp, std::min(warp + 32, first + threads), State::WARP);
      }
    }
    const auto ready = [](const Fiber& fiber) { return fiber.state == State::READY; };
    if (released || std::any_of(fibers.begin(), fibers.end(), ready)) continue;
    return std::count_if(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state != State::DONE; });
  }
}

}  // namespace

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& kernel) {
  if (config.dynamicSmemBytes > MAX_SHARED || config.blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  const unsigned size = config.numAttrs ? config.attrs[0].val.clusterDim.x : 1;
  if (config.gridDim.x % size || size > 8 || (size > 1 && settings.major < 9)) return cudaErrorInvalidConfiguration;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  body = &kernel;
  shared_bytes = config.dynamicSmemBytes;
  for (const size_t first : ordered(config.gridDim.x / size, 0)) {
    std::vector<Block> blocks(size);
    for (unsigned rank = 0; rank < size; ++rank) {
      blocks[rank].index = {static_cast<unsigned>(first) * size + rank, 0, 0};
      blocks[rank].shared.reset(new unsigned char[shared_bytes + 16]);
      blocks[rank].running = config.blockDim.x;
      std::memset(blocks[rank].shared.get(), 0xFF, shared_bytes);
    }
    if (const size_t stuck = run(blocks, config.blockDim.x)) {
      std::fprintf(stderr, "cuda shim: %zu threads wait at a barrier or shuffle that the others never reach\n", stuck);
      return cudaErrorUnknown;
    }
  }
  return cudaSuccess;
}

unsigned char* shared_memory() { return current->block->shared.get(); }

unsigned char* shared_memory_of(void* mine, unsigned rank) {
  return (*cluster)[rank].shared.get() + (static_cast<unsigned char*>(mine) - shared_memory());
}

int lane() { return static_cast<int>(current->thread % 32); }

float exchange(float value, unsigned mask, int from) {
  current->value = value;
  current->mask = mask;
  current->from = from;
  wait(State::WARP);
  return current->value;
}

void cluster_arrive() { ++current->arrivals; }

void cluster_wait() {
  if (settings.clusters && current->arrivals > cluster_phase) wait(State::CLUSTER);
}

}  // namespace shim

void __syncthreads() {
  if (shim::settings.barriers) shim::wait(shim::State::BLOCK);
}
