// The exact block map of a window over latent frames: happyhorse_fast/block_map/layout.py, without a list of ranges.
#pragma once

#include <optional>
#include <vector>

#include "block_map.hpp"

namespace host {

// One clip: frames of video, then audio, then text; see Layout in happyhorse_fast/block_map/layout.py.
struct Layout {
  std::int64_t frames, frame_tokens, audio, text;
  bool align_frames, align_modalities;
};

// Video sees the frames at most `receptive_field` away (all where there is none), audio and text; audio and text see all
// of their clip. Clips follow each other. Refuses a negative size, and an empty list.
BlockMap frame_window(const std::vector<Layout>& layouts, std::optional<std::int64_t> receptive_field);

}  // namespace host
