// Blocks of memory that are kept for the next request of their size. No torch here.
#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <shared_mutex>
#include <unordered_set>

namespace fastdiff {

// Memory of the system, aligned to 64 bytes; an exception where there is none.
void* system_allocate(size_t bytes);
void system_free(void* data);

class Pool;

// What stands before a block. `above` and `below`: the idle blocks of its size; `newer` and `older`: all idle blocks.
struct alignas(64) Block {
  Pool* owner;
  int size_class;
  Block *above, *below, *newer, *older;
};
static_assert(sizeof(Block) == 64, "a block starts on a cache line");

// Sizes are multiples of 64 in eight steps from one power of two to the next: at most an eighth is not asked for.
constexpr int SIZE_CLASSES = 512;

inline int size_class(size_t bytes) {
  const uint64_t last = bytes == 0 ? 0 : (bytes - 1) / 64;
  if (last < 8) return static_cast<int>(last);
  const int shift = std::bit_width(last) - 4;
  return 8 * shift + static_cast<int>(last >> shift);
}

inline size_t class_bytes(int index) {
  if (index < 8) return 64 * (static_cast<size_t>(index) + 1);
  const int shift = index / 8 - 1;
  return 64 * (static_cast<size_t>(index % 8 + 9) << shift);
}

// The addresses of all blocks there are, of which one may be asked whether it is a pool's.
class Addresses {
 public:
  void add(const void* data) {
    const std::unique_lock lock(mutex_);
    all_.insert(data);
  }
  void remove(const void* data) {
    const std::unique_lock lock(mutex_);
    all_.erase(data);
  }
  bool hold(const void* data) {
    const std::shared_lock lock(mutex_);
    return all_.count(data) != 0;
  }

 private:
  std::shared_mutex mutex_;
  std::unordered_set<const void*> all_;
};

// Never destroyed: blocks are given back until the process ends.
inline Addresses& addresses() {
  static Addresses* const all = new Addresses;
  return *all;
}

// Of all pools; held counts what is theirs now.
struct Totals {
  std::atomic<int64_t> held{0}, hits{0}, misses{0};
};

inline Totals& totals() {
  static Totals* const all = new Totals;
  return *all;
}

// Any thread may allocate and release. A pool lives as long as something refers to it: its maker, a scope, a block.
class Pool {
 public:
  explicit Pool(size_t limit) : limit_(limit) {}
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  void retain() { references_.fetch_add(1, std::memory_order_relaxed); }
  void drop() {
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  void* allocate(size_t bytes) {
    const int index = size_class(bytes);
    Block* block = take(index);
    if (!block) block = create(index);
    retain();
    return block + 1;
  }

  static void release(void* data) {
    Block* const block = static_cast<Block*>(data) - 1;
    Pool* const owner = block->owner;
    owner->put(block);
    owner->drop();
  }

  // Bytes of idle blocks that may be kept; those idle for longest go first.
  void set_limit(size_t limit) {
    Block* excess;
    {
      const std::lock_guard lock(mutex_);
      limit_ = limit;
      excess = trim(limit);
    }
    destroy(excess);
  }

  // Gives every idle block back to the system.
  void clear() {
    Block* excess;
    {
      const std::lock_guard lock(mutex_);
      excess = trim(0);
    }
    destroy(excess);
  }

  int64_t held() const { return held_; }
  int64_t idle() {
    const std::lock_guard lock(mutex_);
    return static_cast<int64_t>(idle_);
  }
  int64_t hits() const { return hits_; }
  int64_t misses() const { return misses_; }

 private:
  ~Pool() { clear(); }

  static size_t room(const Block* block) { return sizeof(Block) + class_bytes(block->size_class); }

  Block* take(int index) {
    const std::lock_guard lock(mutex_);
    Block* const block = top_[index];
    if (block) {
      unlink(block);
      ++hits_;
      ++totals().hits;
    }
    return block;
  }

  Block* create(int index) {
    const size_t bytes = sizeof(Block) + class_bytes(index);
    void* memory;
    try {
      memory = system_allocate(bytes);
    } catch (const std::exception&) {  // what lies idle here may be what is missing
      clear();
      memory = system_allocate(bytes);
    }
    Block* const block = new (memory) Block{this, index, nullptr, nullptr, nullptr, nullptr};
    addresses().add(block + 1);
    ++misses_;
    ++totals().misses;
    held_ += static_cast<int64_t>(bytes);
    totals().held += static_cast<int64_t>(bytes);
    return block;
  }

  void put(Block* block) {
    Block* excess;
    {
      const std::lock_guard lock(mutex_);
      link(block);
      excess = trim(limit_);
    }
    destroy(excess);
  }

  void link(Block* block) {
    Block*& top = top_[block->size_class];
    block->above = nullptr;
    block->below = top;
    if (top) top->above = block;
    top = block;
    block->newer = nullptr;
    block->older = newest_;
    (newest_ ? newest_->newer : oldest_) = block;
    newest_ = block;
    idle_ += room(block);
  }

  void unlink(Block* block) {
    (block->above ? block->above->below : top_[block->size_class]) = block->below;
    if (block->below) block->below->above = block->above;
    (block->newer ? block->newer->older : newest_) = block->older;
    (block->older ? block->older->newer : oldest_) = block->newer;
    idle_ -= room(block);
  }

  // Takes the oldest idle blocks out until the rest fits; a list of them through `below`.
  Block* trim(size_t limit) {
    Block* excess = nullptr;
    while (idle_ > limit) {
      Block* const block = oldest_;
      unlink(block);
      block->below = excess;
      excess = block;
    }
    return excess;
  }

  void destroy(Block* excess) {
    while (excess) {
      Block* const block = excess;
      excess = block->below;
      held_ -= static_cast<int64_t>(room(block));
      totals().held -= static_cast<int64_t>(room(block));
      addresses().remove(block + 1);
      system_free(block);
    }
  }

  std::mutex mutex_;  // of the lists, idle_ and limit_
  Block* top_[SIZE_CLASSES] = {};
  Block *newest_ = nullptr, *oldest_ = nullptr;
  size_t idle_ = 0, limit_;
  std::atomic<int64_t> held_{0}, hits_{0}, misses_{0}, references_{1};
};

}  // namespace fastdiff
