// Runs whole blocks of a kernel on the CPU: one fiber per thread, with barriers and exchanges between a warp's lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace shim {

constexpr int LANES = 32;
constexpr std::size_t PAYLOAD = 64;  // most bytes a lane gives to one exchange
constexpr std::size_t VECTOR = 16;   // bytes of a cp.async and of a row of ldmatrix
constexpr int POISON = 0xff;         // a NaN as float32, bf16 and e4m3, and -1 as an integer

struct Index {
  unsigned x, y, z;
};

// A place in the source where a thread waits, and the function that it waits in.
struct Site {
  const char* what;
  const char* file;
  int line;
};

// A launch, as the tests' runner fills it in.
struct Launch {
  const void* params;
  std::uint64_t params_bytes;
  Index grid;
  unsigned threads;
  std::uint64_t shared_bytes;
  // Order in which threads and blocks run: 0 ascending, 1 descending, else shuffled by this seed. A warp runs until its
  // lanes wait for other warps. So in some order a missing barrier, before a read or before the next write, changes
  // bits.
  unsigned order;
};

using Body = void (*)(const void* params);

// Runs every block of the grid, one after another. Returns 0, or 1 with the problem in `message`.
int run(const Launch& launch, std::size_t params_bytes, unsigned max_threads, char* message, std::size_t capacity,
        Body body);

// State of the running thread.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
unsigned char* shared_memory();

// Begins to copy 16 bytes, as cp.async does: only the first `bytes` are read, the others become zeros. Until the thread
// waits, the source is not read and the destination holds poison, so that a thread that reads too early finds neither
// new nor old data. Fails where an address is not aligned to 16 bytes, or `shared` is not in shared memory.
void begin_copy(Site site, void* shared, const void* global, int bytes);

// Delivers all copies that this thread has begun.
void finish_copies();

// Waits until every thread of the block is at this site.
void barrier(Site site);

// Waits until all 32 lanes of the warp are at this site, and returns the bytes that each of them gave, PAYLOAD bytes
// apart. They are valid until the lane's next exchange.
const unsigned char* exchange(Site site, unsigned mask, const void* given, std::size_t bytes);

// Reads what a lane gave.
template <typename T>
T read(const unsigned char* table, int lane) {
  T value;
  std::memcpy(&value, table + static_cast<std::size_t>(lane) * PAYLOAD, sizeof value);
  return value;
}

inline bool aligned(const void* address) { return reinterpret_cast<std::uintptr_t>(address) % VECTOR == 0; }

// Fails with the problem where the 16 bytes from `address` on are not in shared memory.
void check_shared(Site site, const void* address, const char* problem);

// Ends the launch with the site and the problem as its message.
[[noreturn]] void fail(Site site, const char* problem);

}  // namespace shim

#define SHIM_SITE(what) (shim::Site{what, __FILE__, __LINE__})
