// Runs whole blocks of a kernel on the CPU: a fiber per thread, barriers and warp exchanges that all must reach.
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

// Where in the source a thread waits, and for what.
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
  // lanes wait for other warps, so a missing barrier, before a read or before the next write, gives other bits in one.
  unsigned order;
};

using Body = void (*)(const void* params);

// Runs every block of the grid, one after another. 0, or 1 with what went wrong in `message`.
int run(const Launch& launch, std::size_t params_bytes, unsigned max_threads, char* message, std::size_t capacity,
        Body body);

// Of the thread that is running.
const Index& thread_index();
const Index& block_index();
const Index& block_size();
const Index& grid_size();
unsigned char* shared_memory();
std::size_t shared_bytes();

// A copy to shared memory that was begun and not waited for; a thread must not return with one.
struct Copy {
  unsigned char* to;
  const void* from;
  std::size_t bytes;
};
std::vector<Copy>& copies();  // of the thread that is running

// Waits until every thread of the block is at this site.
void barrier(Site site);

// Waits until all 32 lanes of the warp are at this site; then every lane may read what each of them gave, PAYLOAD bytes
// apart, until it meets the others again.
const unsigned char* exchange(Site site, unsigned mask, const void* given, std::size_t bytes);

// Ends the launch with a message.
[[noreturn]] void fail(Site site, const char* problem);

}  // namespace shim

#define SHIM_SITE(what) (shim::Site{what, __FILE__, __LINE__})
