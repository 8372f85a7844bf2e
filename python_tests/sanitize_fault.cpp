// Planted faults: the sanitizers have to report both, or their silence means nothing.
#include <cstdint>

extern "C" {

__attribute__((visibility("default"))) float read_at(const float* x, int64_t i) { return x[i]; }

__attribute__((visibility("default"))) int32_t add(int32_t a, int32_t b) { return a + b; }
}
