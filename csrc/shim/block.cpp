#include "block.hpp"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.hpp"

namespace shim {
namespace {

constexpr std::size_t MAX_SHARED = 232448;  // bytes, the limit of a block on an H100
constexpr std::size_t SHARED_ALIGNMENT = 128;
constexpr unsigned MAX_THREADS = 1024;
constexpr std::size_t MAX_PARAMS = 4096;

enum class State { ready, waiting, finished };

// A copy to shared memory that has begun and was not waited for. A thread must not return with one.
struct Copy {
  unsigned char* to;
  const void* from;
  std::size_t bytes;
};

struct Thread {
  Fiber fiber;
  Index index;
  State state;
  Site site;
  std::vector<Copy> copies;
};

// Of all threads of a block, or of a warp's lanes.
struct Meeting {
  unsigned arrived = 0;
  const Thread* first = nullptr;  // first thread that waits; all others wait at its site
};

struct Warp {
  Meeting meeting;
  unsigned char given[LANES][PAYLOAD];
  unsigned char taken[LANES][PAYLOAD];
};

struct Block {
  Body body;
  const void* params;
  Index size, grid;
  std::size_t shared_bytes;
  Index index{};
  std::vector<Thread> threads{};
  std::vector<Warp> warps{};
  std::unique_ptr<unsigned char, void (*)(void*)> shared{nullptr, std::free};
  Meeting meeting{};
  Thread* running = nullptr;
  std::string problem{};
};

Block* current = nullptr;

std::string describe(const Site& site) {
  const char* const slash = std::strrchr(site.file, '/');
  return std::string(site.what) + " at " + (slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(const Site& a, const Site& b) {
  return a.line == b.line && std::strcmp(a.file, b.file) == 0 && std::strcmp(a.what, b.what) == 0;
}

std::string name(const Thread& thread) { return "thread " + std::to_string(thread.index.x); }

void thread_main(void* argument) {
  auto* const thread = static_cast<Thread*>(argument);
  try {
    current->body(current->params);
    if (!thread->copies.empty()) throw std::runtime_error("returns while copies to shared memory are under way");
  } catch (const std::exception& error) {
    if (current->problem.empty()) current->problem = name(*thread) + ": " + error.what();
  }
  thread->state = State::finished;
  thread->fiber.leave(true);
}

// Waits until `count` threads from `first` on are at this site. The last of them calls `done` before any goes on.
template <typename Done>
void meet(Meeting& meeting, Site site, unsigned first, unsigned count, Done done) {
  Thread& me = *current->running;
  if (meeting.arrived == 0) meeting.first = &me;
  if (meeting.arrived > 0 && !same(meeting.first->site, site)) {
    throw std::runtime_error(describe(site) + ", while " + name(*meeting.first) + " waits in " +
                             describe(meeting.first->site));
  }
  if (++meeting.arrived < count) {
    me.state = State::waiting;
    me.site = site;
    me.fiber.leave();
    return;
  }
  meeting.arrived = 0;
  done();
  for (unsigned i = first; i < first + count; ++i) current->threads[i].state = State::ready;
}

// Describes a deadlock: for each place where threads wait, how many do, and the first of them.
std::string deadlock() {
  std::vector<std::string> places;
  for (const Thread& thread : current->threads) {
    places.push_back(thread.state == State::finished ? "has returned" : "waits in " + describe(thread.site));
  }
  std::string text = "deadlock: not all threads meet:";
  for (auto place = places.begin(); place != places.end(); ++place) {
    if (std::find(places.begin(), place, *place) != place) continue;  // not the first there
    text += " " + std::to_string(std::count(place, places.end(), *place)) + " (first: thread " +
            std::to_string(place - places.begin()) + ") " + *place + ";";
  }
  return text;
}

// Runs every lane of a warp that can run until it waits; returns false where none can. The caller repeats this until
// then, so that a warp runs as far ahead of the others as barriers let it: they read what it overwrites too early.
bool run_lanes(std::size_t warp, const std::vector<std::size_t>& lanes) {
  bool moved = false;
  for (const std::size_t lane : lanes) {
    Thread& thread = current->threads[warp * LANES + lane];
    if (thread.state != State::ready) continue;
    current->running = &thread;
    thread.fiber.resume();
    moved = true;
    if (!current->problem.empty()) break;
  }
  return moved;
}

void run_block(unsigned order, std::mt19937& random) {
  Block& block = *current;
  if (block.shared) std::memset(block.shared.get(), POISON, block.shared_bytes);
  block.meeting = {};
  for (Warp& warp : block.warps) {
    warp.meeting = {};
    std::memset(warp.given, POISON, sizeof warp.given);
  }
  for (Thread& thread : block.threads) {
    thread.state = State::ready;
    thread.copies.clear();
    thread.fiber.start(thread_main, &thread);
  }
  std::vector<std::size_t> warps(block.warps.size()), lanes(LANES);
  std::iota(warps.begin(), warps.end(), 0);
  std::iota(lanes.begin(), lanes.end(), 0);
  if (order == 1) {
    std::reverse(warps.begin(), warps.end());
    std::reverse(lanes.begin(), lanes.end());
  }
  while (block.problem.empty()) {
    if (order > 1) std::shuffle(warps.begin(), warps.end(), random);
    bool moved = false;
    for (const std::size_t warp : warps) {
      while (run_lanes(warp, lanes)) {
        if (!block.problem.empty()) return;
        if (order > 1) std::shuffle(lanes.begin(), lanes.end(), random);
        moved = true;
      }
    }
    if (moved) continue;
    const bool all = std::all_of(block.threads.begin(), block.threads.end(),
                                 [](const Thread& thread) { return thread.state == State::finished; });
    if (all) return;
    block.problem = deadlock();
  }
}

void check(bool holds, const std::string& problem) {
  if (!holds) throw std::invalid_argument(problem);
}

}  // namespace

int run(const Launch& launch, std::size_t params_bytes, unsigned max_threads, char* message, std::size_t capacity,
        Body body) {
  try {
    check(current == nullptr, "a launch inside a launch");
    check(launch.params_bytes == params_bytes, "params are " + std::to_string(launch.params_bytes) +
                                                   " bytes, the kernel's struct has " + std::to_string(params_bytes));
    check(params_bytes <= MAX_PARAMS, "params must be at most 4096 bytes");
    check(launch.threads > 0 && launch.threads % LANES == 0 && launch.threads <= std::min(max_threads, MAX_THREADS),
          "threads must be a multiple of 32 up to " + std::to_string(std::min(max_threads, MAX_THREADS)) + ", got " +
              std::to_string(launch.threads));
    check(launch.grid.x > 0 && launch.grid.y > 0 && launch.grid.z > 0, "no side of the grid may be 0");
    check(launch.grid.y <= 65535 && launch.grid.z <= 65535, "the grid's y and z must be at most 65535");
    check(launch.shared_bytes <= MAX_SHARED, "shared memory must be at most 232448 bytes, got " +
                                                 std::to_string(launch.shared_bytes));
    Block block{body, launch.params, {launch.threads, 1, 1}, launch.grid, launch.shared_bytes};
    block.threads = std::vector<Thread>(launch.threads);
    block.warps = std::vector<Warp>(launch.threads / LANES);
    if (launch.shared_bytes > 0) {
      void* memory = nullptr;  // of exactly that size, so that a sanitizer reports the first byte past it
      check(posix_memalign(&memory, SHARED_ALIGNMENT, launch.shared_bytes) == 0, "out of memory");
      block.shared.reset(static_cast<unsigned char*>(memory));
    }
    for (unsigned i = 0; i < launch.threads; ++i) block.threads[i].index = {i, 0, 0};

    const std::uint64_t blocks = std::uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z;
    std::vector<std::uint64_t> turn(blocks);
    std::iota(turn.begin(), turn.end(), 0);
    std::mt19937 random(launch.order);
    if (launch.order == 1) std::reverse(turn.begin(), turn.end());
    if (launch.order > 1) std::shuffle(turn.begin(), turn.end(), random);
    current = &block;
    for (const std::uint64_t i : turn) {
      block.index = {static_cast<unsigned>(i % launch.grid.x), static_cast<unsigned>(i / launch.grid.x % launch.grid.y),
                     static_cast<unsigned>(i / launch.grid.x / launch.grid.y)};
      run_block(launch.order, random);
      if (!block.problem.empty()) break;
    }
    current = nullptr;
    if (block.problem.empty()) return 0;
    std::snprintf(message, capacity, "block (%u, %u, %u): %s", block.index.x, block.index.y, block.index.z,
                  block.problem.c_str());
  } catch (const std::exception& error) {
    current = nullptr;
    std::snprintf(message, capacity, "%s", error.what());
  }
  return 1;
}

const Index& thread_index() { return current->running->index; }
const Index& block_index() { return current->index; }
const Index& block_size() { return current->size; }
const Index& grid_size() { return current->grid; }

void fail(Site site, const char* problem) { throw std::runtime_error(describe(site) + ": " + problem); }

void check_shared(Site site, const void* address, const char* problem) {
  const auto* const at = static_cast<const unsigned char*>(address);
  const unsigned char* const shared = current->shared.get();
  if (at < shared || at + VECTOR > shared + current->shared_bytes) fail(site, problem);
}

unsigned char* shared_memory() { return current->shared.get(); }

void begin_copy(Site site, void* shared, const void* global, int bytes) {
  if (!aligned(shared) || !aligned(global)) fail(site, "both addresses must be aligned to 16 bytes");
  if (bytes < 0 || bytes > static_cast<int>(VECTOR)) fail(site, "0 to 16 bytes may be read");
  check_shared(site, shared, "outside shared memory");
  std::memset(shared, POISON, VECTOR);
  current->running->copies.push_back({static_cast<unsigned char*>(shared), global, static_cast<std::size_t>(bytes)});
}

void finish_copies() {
  std::vector<Copy>& copies = current->running->copies;
  for (const Copy& copy : copies) {
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, copy.bytes);
    std::memset(copy.to + copy.bytes, 0, VECTOR - copy.bytes);
  }
  copies.clear();
}

void barrier(Site site) {
  meet(current->meeting, site, 0, current->size.x, [] {});
}

const unsigned char* exchange(Site site, unsigned mask, const void* given, std::size_t bytes) {
  const unsigned me = current->running->index.x;
  Warp& warp = current->warps[me / LANES];
  if (mask != 0xffffffffu) fail(site, "the mask must name all 32 lanes");
  if (bytes > PAYLOAD) fail(site, "too many bytes for an exchange");
  std::memcpy(warp.given[me % LANES], given, bytes);
  meet(warp.meeting, site, me / LANES * LANES, LANES,
       [&] { std::memcpy(warp.taken, warp.given, sizeof warp.taken); });
  return &warp.taken[0][0];
}

}  // namespace shim
