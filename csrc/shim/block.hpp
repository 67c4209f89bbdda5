// Runs whole blocks of a kernel on the CPU: one fiber per thread, with barriers and exchanges between a warp's lanes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace shim {

constexpr int LANES = 32;
constexpr std::size_t PAYLOAD = 64;  // most bytes a lane gives to one exchange
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
std::size_t shared_bytes();

// A copy to shared memory that has begun and was not waited for. A thread must not return with one.
struct Copy {
  unsigned char* to;
  const void* from;
  std::size_t bytes;
};
std::vector<Copy>& copies();  // of the running thread

// Waits until every thread of the block is at this site.
void barrier(Site site);

// Waits until all 32 lanes of the warp are at this site, and returns the bytes that each of them gave, PAYLOAD bytes
// apart. They are valid until the lane's next exchange.
const unsigned char* exchange(Site site, unsigned mask, const void* given, std::size_t bytes);

// Ends the launch with the site and the problem as its message.
[[noreturn]] void fail(Site site, const char* problem);

}  // namespace shim

#define SHIM_SITE(what) (shim::Site{what, __FILE__, __LINE__})
