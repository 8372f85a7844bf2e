// Findings: what was wrong, and where in the source.
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <map>
#include <unordered_map>

#include "host_executor/state.h"

namespace host_executor {
namespace {

// Sites are small numbers for code addresses, so that a cell can hold two of them.
std::vector<const void*>& places() {
  static std::vector<const void*> all{nullptr};
  return all;
}

std::string dim_text(Dim3 dim) {
  return "(" + std::to_string(dim.x) + ", " + std::to_string(dim.y) + ", " + std::to_string(dim.z) +
         ")";
}

std::string base_name(const std::string& path) { return path.substr(path.rfind('/') + 1); }

// The kernel's line first, then the headers of the vocabulary that were inlined there.
std::string chain_text(const std::vector<std::string>& chain) {
  const auto in_vocabulary = [](const std::string& line) {
    return line.find("/common/") != std::string::npos;
  };
  std::string text, inner;
  for (const std::string& line : chain) {
    if (text.empty() && !in_vocabulary(line)) {
      text = base_name(line);
    } else if (text.empty() && inner.empty()) {
      inner = base_name(line);
    }
  }
  if (text.empty()) return inner;
  return inner.empty() ? text : text + " (" + inner + ")";
}

}  // namespace

uint32_t site_of(const void* place) {
  static std::unordered_map<const void*, uint32_t> known;
  // NOTE: most accesses come from few places; the table is a hash away, a map is not.
  static struct {
    const void* place;
    uint32_t site;
  } cache[1024] = {};
  auto& entry = cache[reinterpret_cast<uintptr_t>(place) % 1024];
  if (entry.place == place && place != nullptr) return entry.site;
  const auto [found, is_new] = known.emplace(place, static_cast<uint32_t>(places().size()));
  if (is_new) places().push_back(place);
  entry = {place, found->second};
  return found->second;
}

const void* place_of(uint32_t site) { return places()[site]; }

void report(Kind kind, uint32_t site, uint32_t other, const std::string& text) {
  std::vector<Finding>& findings = machine->report.findings;
  for (Finding& finding : findings) {
    if (finding.kind == kind && finding.place == place_of(site) &&
        finding.other == place_of(other)) {
      finding.count++;
      return;
    }
  }
  findings.push_back({kind, text, place_of(site), place_of(other)});
}

std::string describe(const Thread& thread) {
  return "thread " + std::to_string(thread.index) + " of block " +
         dim_text(thread.identity.block_idx);
}

std::string describe(const Region& region, const void* p) {
  const int64_t offset = static_cast<const unsigned char*>(p) - region.base;
  const std::string name = region.block != nullptr ? region.name : "'" + region.name + "'";
  if (offset < 0) return std::to_string(-offset) + " bytes before " + name;
  const auto bytes = static_cast<int64_t>(region.bytes);
  if (offset >= bytes) {
    return "byte " + std::to_string(offset) + " of " + name + ", which has " +
           std::to_string(bytes);
  }
  return "byte " + std::to_string(offset) + " of " + name;
}

std::string describe(Epoch epoch) {
  const Dim3 block = machine->config.block, cluster = machine->config.cluster;
  const uint32_t threads = block.x * block.y * block.z;
  const bool is_thread = epoch.agent() < threads * cluster.x * cluster.y * cluster.z;
  const uint32_t rank = is_thread ? epoch.agent() / threads : 0;
  const std::string what =
      is_thread ? "thread " + std::to_string(epoch.agent() % threads) : "an asynchronous operation";
  const bool has_peers = !is_thread && cluster.x * cluster.y * cluster.z > 1;
  return what + (has_peers ? " of the cluster of block " : " of block ") +
         dim_text(block_idx_of(epoch.cluster(), rank));
}

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::kRace:
      return "race";
    case Kind::kUninitialized:
      return "uninitialized";
    case Kind::kOutOfBounds:
      return "out_of_bounds";
    case Kind::kMisaligned:
      return "misaligned";
    case Kind::kReadOnly:
      return "read_only";
    case Kind::kProxyFence:
      return "proxy_fence";
    case Kind::kDivergence:
      return "divergence";
    case Kind::kDeadlock:
      return "deadlock";
    case Kind::kMbarrier:
      return "mbarrier";
    case Kind::kUnwaited:
      return "unwaited";
    case Kind::kUnwritten:
      return "unwritten";
    case Kind::kWgmma:
      return "wgmma";
    case Kind::kClusterExit:
      return "cluster_exit";
    case Kind::kInvalid:
      return "invalid";
    case Kind::kCrash:
      return "crash";
  }
  return "unknown";
}

uint64_t Report::count(Kind kind) const {
  uint64_t sum = 0;
  for (const Finding& finding : findings) sum += finding.kind == kind ? finding.count : 0;
  return sum;
}

std::vector<std::string> source_lines(const std::vector<const void*>& wanted) {
  // NOTE: faults are reported from the same places again and again, and addr2line is slow.
  static std::unordered_map<const void*, std::string> known{{nullptr, ""}};
  struct Asked {
    const void* place;
    size_t offset;
  };
  std::map<std::string, std::vector<Asked>> by_library;
  for (const void* place : wanted) {
    Dl_info info;
    if (!known.emplace(place, "").second || dladdr(place, &info) == 0) continue;
    if (info.dli_fname == nullptr) continue;
    // One before the return address is in the call.
    const auto* base = static_cast<const char*>(info.dli_fbase);
    by_library[info.dli_fname].push_back(
        {place, static_cast<size_t>(static_cast<const char*>(place) - base - 1)});
  }
  for (const auto& [library, asked] : by_library) {
    std::string command = "addr2line -a -i -e '" + library + "'";
    char text[512];
    for (const Asked& each : asked) {
      snprintf(text, sizeof(text), " 0x%zx", each.offset);
      command += text;
    }
    FILE* pipe = popen((command + " 2>/dev/null").c_str(), "r");
    if (pipe == nullptr) continue;
    std::vector<std::vector<std::string>> chains;
    while (fgets(text, sizeof(text), pipe) != nullptr) {
      std::string line(text);
      line = line.substr(0, line.find_first_of("\n "));  // without a discriminator
      if (line.rfind("0x", 0) == 0) {
        chains.emplace_back();
      } else if (!chains.empty()) {
        chains.back().push_back(line);
      }
    }
    pclose(pipe);
    for (size_t i = 0; i < std::min(asked.size(), chains.size()); i++) {
      known[asked[i].place] = chain_text(chains[i]);
    }
  }
  std::vector<std::string> lines;
  for (const void* place : wanted) lines.push_back(known[place]);
  return lines;
}

std::string Report::text() const {
  std::vector<const void*> wanted;
  for (const Finding& finding : findings) {
    wanted.push_back(finding.place);
    wanted.push_back(finding.other);
  }
  const std::vector<std::string> lines = source_lines(wanted);
  std::string all;
  for (size_t i = 0; i < findings.size(); i++) {
    const Finding& finding = findings[i];
    all += std::string(kind_name(finding.kind)) + ": " + finding.text;
    if (!lines[2 * i].empty()) all += "\n    at " + lines[2 * i];
    if (!lines[2 * i + 1].empty()) all += "\n    and " + lines[2 * i + 1];
    if (finding.count > 1) all += "\n    " + std::to_string(finding.count) + " times";
    all += "\n";
  }
  return all;
}

}  // namespace host_executor
