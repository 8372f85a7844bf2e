// Happens-before by vector clocks. Threads and asynchronous operations are agents of a cluster.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

namespace host_executor {

// The latest moment of every agent that its owner knows to have passed.
class VectorClock {
 public:
  uint32_t operator[](uint32_t agent) const { return agent < times_.size() ? times_[agent] : 0; }
  void raise(uint32_t agent, uint32_t time) {
    if (agent >= times_.size()) times_.resize(agent + 1, 0);
    times_[agent] = std::max(times_[agent], time);
  }
  void join(const VectorClock& other) {
    if (times_.size() < other.times_.size()) times_.resize(other.times_.size(), 0);
    for (size_t i = 0; i < other.times_.size(); i++) {
      times_[i] = std::max(times_[i], other.times_[i]);
    }
  }
  // What both know.
  void meet(const VectorClock& other) {
    if (times_.size() > other.times_.size()) times_.resize(other.times_.size());
    for (size_t i = 0; i < times_.size(); i++) times_[i] = std::min(times_[i], other.times_[i]);
  }
  void clear() { times_.clear(); }
  size_t size() const { return times_.size(); }

 private:
  std::vector<uint32_t> times_;
};

// A moment of an agent in 58 bits, so that six flags fit beside it.
struct Epoch {
  uint64_t bits = 0;

  static constexpr int kTimeBits = 22, kAgentBits = 14, kClusterBits = 22;
  static Epoch of(uint32_t cluster, uint32_t agent, uint32_t time) {
    return {(uint64_t{cluster} << (kAgentBits + kTimeBits)) | (uint64_t{agent} << kTimeBits) |
            time};
  }
  explicit operator bool() const { return bits != 0; }
  uint32_t time() const { return bits & ((1u << kTimeBits) - 1); }
  uint32_t agent() const { return bits >> kTimeBits & ((1u << kAgentBits) - 1); }
  uint32_t cluster() const { return static_cast<uint32_t>(bits >> (kAgentBits + kTimeBits)); }
};

// What an agent knows of all others.
struct Knowledge {
  uint32_t cluster = 0;  // whose agents `seen` and `fenced` are about
  VectorClock seen;
  // Generic writes that a proxy fence has made visible to the async proxy, on a path to here.
  VectorClock fenced;
  // Other clusters, heard of through atomics with fences.
  std::map<uint32_t, VectorClock> foreign;

  bool knows(Epoch epoch) const {
    if (epoch.cluster() == cluster) return seen[epoch.agent()] >= epoch.time();
    const auto found = foreign.find(epoch.cluster());
    return found != foreign.end() && found->second[epoch.agent()] >= epoch.time();
  }
  bool knows_fenced(Epoch epoch) const { return fenced[epoch.agent()] >= epoch.time(); }
  void join(const Knowledge& other) {
    (other.cluster == cluster ? seen : foreign[other.cluster]).join(other.seen);
    if (other.cluster == cluster) fenced.join(other.fenced);
    for (const auto& [id, clock] : other.foreign) (id == cluster ? seen : foreign[id]).join(clock);
  }
  void meet(const Knowledge& other) {
    seen.meet(other.seen);
    fenced.meet(other.fenced);
  }
  void clear() {
    seen.clear();
    fenced.clear();
    foreign.clear();
  }
};

}  // namespace host_executor
