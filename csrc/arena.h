// Memory that one call of a network leaves for the next. No torch here.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <new>
#include <vector>

#include "system_memory.h"

namespace fastdiff {

// A set of offsets, as parts [begin, end) that neither overlap nor touch.
class Ranges {
 public:
  static constexpr size_t NOWHERE = SIZE_MAX;
  using Parts = std::map<size_t, size_t>;

  // How many of the offsets were not in the set.
  size_t add(size_t begin, size_t end) {
    auto next = parts_.upper_bound(begin);
    if (next != parts_.begin() && std::prev(next)->second >= begin) --next;
    if (next != parts_.end() && next->first <= begin && next->second >= end) return 0;
    size_t had = 0;
    while (next != parts_.end() && next->first <= end) {
      begin = std::min(begin, next->first);
      end = std::max(end, next->second);
      had += next->second - next->first;
      next = parts_.erase(next);
    }
    parts_.emplace_hint(next, begin, end);
    size_ += end - begin - had;
    return end - begin - had;
  }

  // How many of the offsets were in the set.
  size_t remove(size_t begin, size_t end) {
    size_t gone = 0;
    auto next = parts_.upper_bound(begin);
    if (next != parts_.begin() && std::prev(next)->second > begin) --next;
    while (next != parts_.end() && next->first < end) {
      const auto [first, last] = *next;
      next = parts_.erase(next);
      if (first < begin) parts_.emplace_hint(next, first, begin);
      if (last > end) parts_.emplace_hint(next, end, last);
      gone += std::min(last, end) - std::max(first, begin);
      if (last > end) break;
    }
    size_ -= gone;
    return gone;
  }

  // Where the first part of at least that many begins.
  size_t fit(size_t bytes) const {
    for (const auto& [begin, end] : parts_)
      if (end - begin >= bytes) return begin;
    return NOWHERE;
  }

  bool meet(size_t begin, size_t end) const {
    const auto next = parts_.lower_bound(end);
    return next != parts_.begin() && std::prev(next)->second > begin;
  }

  size_t size() const { return size_; }
  const Parts& parts() const { return parts_; }

 private:
  Parts parts_;
  size_t size_ = 0;
};

// Of all pools; held counts what is theirs now.
struct Totals {
  std::atomic<int64_t> held{0}, hits{0}, misses{0};
};

inline Totals& totals() {
  static Totals* const all = new Totals;
  return *all;
}

class Pool;

// Never destroyed: blocks are released until the process ends.
struct Pools {
  std::mutex mutex;  // of all that any pool holds
  std::vector<Pool*> all;
};

inline Pools& pools() {
  static Pools* const made = [] {
    // In the child the thread that held the mutex is not there to give it back.
    system_around_fork([] { pools().mutex.lock(); }, [] { pools().mutex.unlock(); });
    return new Pools;
  }();
  return *made;
}

// What stands before a block.
struct alignas(64) Block {
  Pool* owner;
  size_t bytes;  // this included
};
static_assert(sizeof(Block) == 64, "a block starts on a cache line");

// A stretch of addresses as large as the machine's memory. A block lies in the first gap that it fits, so that calls
// that ask for the same find it at the same addresses, and what they need together lies at the beginning. Any thread may
// allocate and release. A pool lives as long as something refers to it: its maker, a scope, a block.
class Pool {
 public:
  explicit Pool(size_t limit) : limit_(limit) {
    const std::lock_guard lock(pools().mutex);
    pools().all.push_back(this);
  }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  void retain() { references_.fetch_add(1, std::memory_order_relaxed); }
  void drop() {
    if (references_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete this;
  }

  // A scope begins, a scope ends.
  void enter() {
    retain();
    const std::lock_guard lock(pools().mutex);
    ++scopes_;
  }

  void leave() {
    {
      const std::lock_guard lock(pools().mutex);
      if (--scopes_ == 0) {
        reached_[calls_++ % CALLS] = top_;
        top_ = 0;
        settle();
      }
    }
    drop();
  }

  // Null if there is no room for it.
  void* allocate(size_t bytes) {
    const std::lock_guard lock(pools().mutex);
    const size_t room = sizeof(Block) + rounded(bytes, sizeof(Block));
    const size_t begin = bytes < SIZE_MAX / 2 ? place(room) : Ranges::NOWHERE;
    if (begin == Ranges::NOWHERE) return note(false), nullptr;
    free_.remove(begin, begin + room);
    const size_t fresh = touched_.add(begin, begin + room);
    note(fresh == 0);
    totals().held += static_cast<int64_t>(fresh);
    used_ += room;
    top_ = std::max(top_, begin + room);
    retain();
    return new (base_ + begin) Block{this, room} + 1;
  }

  static void release(void* data) {
    Block* const block = static_cast<Block*>(data) - 1;
    Pool* const owner = block->owner;
    {
      const std::lock_guard lock(pools().mutex);
      const size_t begin = reinterpret_cast<char*>(block) - owner->base_;
      owner->used_ -= block->bytes;
      owner->free_.add(begin, begin + block->bytes);
      if (owner->scopes_ == 0) owner->settle();
    }
    owner->drop();
  }

  static Pool* owner(const void* data) { return (static_cast<const Block*>(data) - 1)->owner; }

  // Whether it lies in a block of some pool.
  static bool hold(const void* data) {
    const std::lock_guard lock(pools().mutex);
    return std::any_of(pools().all.begin(), pools().all.end(), [data](const Pool* pool) {
      return pool->base_ && data >= pool->base_ && data < pool->base_ + pool->reserved_;
    });
  }

  // Gives back all that is not in use, and what is, as soon as it no longer is.
  void close() {
    const std::lock_guard lock(pools().mutex);
    limit_ = 0;
    give_back(0);
  }

  // Gives back all that is not in use.
  void clear() {
    const std::lock_guard lock(pools().mutex);
    give_back(0);
  }

  int64_t held() const { return count([this] { return touched_.size(); }); }
  int64_t idle() const { return count([this] { return touched_.size() - used_; }); }
  int64_t hits() const { return count([this] { return hits_; }); }
  int64_t misses() const { return count([this] { return misses_; }); }

 private:
  // So many calls later memory goes back that none of them has reached.
  static constexpr size_t CALLS = 8;
  static constexpr size_t STEP = size_t{1} << 21;

  ~Pool() {
    const std::lock_guard lock(pools().mutex);
    pools().all.erase(std::find(pools().all.begin(), pools().all.end(), this));
    totals().held -= static_cast<int64_t>(touched_.size());
    if (mapping_) system_release(mapping_, mapped_);
  }

  static size_t rounded(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

  template <class Number>
  int64_t count(Number number) const {
    const std::lock_guard lock(pools().mutex);
    return static_cast<int64_t>(number());
  }

  void note(bool hit) {
    ++(hit ? hits_ : misses_);
    ++(hit ? totals().hits : totals().misses);
  }

  // Where a block of that size can begin.
  size_t place(size_t room) {
    if (!base_) reserve();
    const size_t begin = free_.fit(room);
    return begin != Ranges::NOWHERE && commit(begin + room) ? begin : Ranges::NOWHERE;
  }

  // As many addresses as can be had, beginning at a large page.
  void reserve() {
    for (size_t bytes = rounded(system_memory(), STEP); bytes >= STEP && !base_; bytes = bytes / 2 / STEP * STEP) {
      mapping_ = system_reserve(bytes + STEP);
      if (!mapping_) continue;
      mapped_ = bytes + STEP;
      base_ = reinterpret_cast<char*>(rounded(reinterpret_cast<size_t>(mapping_), STEP));
      reserved_ = bytes;
      free_.add(0, bytes);
    }
  }

  bool commit(size_t end) {
    if (end <= committed_) return true;
    const size_t wanted = std::min(rounded(end, STEP), reserved_);
    if (!system_commit(base_ + committed_, wanted - committed_)) return false;
    committed_ = wanted;
    return true;
  }

  // Between calls there is no more than the latest calls have reached, and not more idle than the limit.
  void settle() {
    const size_t reached = *std::max_element(reached_, reached_ + CALLS);
    give_back(std::min(rounded(reached, STEP), touched_.size() - used_ > limit_ ? bound() : Ranges::NOWHERE));
  }

  // Up to where there are `limit_` idle bytes.
  size_t bound() const {
    size_t left = limit_;
    for (const auto& [begin, end] : free_.parts()) {
      if (end - begin >= left) return (begin + left) / page_ * page_;
      left -= end - begin;
    }
    return Ranges::NOWHERE;
  }

  // Whole pages that are free, from an offset on.
  void give_back(size_t from) {
    for (const auto& [begin, end] : free_.parts()) {
      const size_t first = rounded(std::max(begin, from), page_), last = std::min(end, committed_) / page_ * page_;
      if (first >= last || !touched_.meet(first, last)) continue;
      system_give_back(base_ + first, last - first);
      totals().held -= static_cast<int64_t>(touched_.remove(first, last));
    }
  }

  void* mapping_ = nullptr;
  char* base_ = nullptr;
  size_t mapped_ = 0, reserved_ = 0, committed_ = 0, used_ = 0, top_ = 0, limit_;
  const size_t page_ = system_page();
  Ranges free_, touched_;  // touched: what may have pages of the system
  size_t reached_[CALLS] = {}, calls_ = 0, scopes_ = 0, hits_ = 0, misses_ = 0;
  std::atomic<int64_t> references_{1};
};

}  // namespace fastdiff
