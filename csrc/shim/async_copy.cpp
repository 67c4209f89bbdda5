#include "async_copy.hpp"

#include <cstring>

namespace shim {
namespace {

constexpr std::size_t COPY = 16;

bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % COPY == 0; }

}  // namespace

void begin_copy(Site site, void* shared, const void* global, int bytes) {
  auto* const to = static_cast<unsigned char*>(shared);
  if (!aligned(to) || !aligned(global)) fail(site, "both addresses must be aligned to 16 bytes");
  if (bytes < 0 || bytes > static_cast<int>(COPY)) fail(site, "0 to 16 bytes may be read");
  if (to < shared_memory() || to + COPY > shared_memory() + shared_bytes()) fail(site, "outside shared memory");
  std::memset(to, POISON, COPY);
  copies().push_back({to, global, static_cast<std::size_t>(bytes)});
}

void finish_copies() {
  for (const Copy& copy : copies()) {
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, COPY - copy.bytes);
  }
  copies().clear();
}

}  // namespace shim
