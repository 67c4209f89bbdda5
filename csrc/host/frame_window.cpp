#include "frame_window.hpp"

#include <algorithm>

namespace host {
namespace {

std::int64_t up(std::int64_t size, bool align) { return align ? ceil_div(size, BLOCK) * BLOCK : size; }

// Where a clip's tokens lie, from slot `origin` on.
struct Place {
  std::int64_t frames, frame_tokens, frame_slots, origin, audio, audio_end, text, text_end, end;

  Place(const Layout& layout, std::int64_t first)
      : frames(layout.frames),
        frame_tokens(layout.frame_tokens),
        frame_slots(up(layout.frame_tokens, layout.align_frames)),
        origin(first),
        // Sizes are at most 2^31, so their product stays below 2^63.
        audio(first + up(frames * frame_slots, layout.align_modalities)),
        audio_end(audio + layout.audio),
        text(first + up(audio_end - first, layout.align_modalities)),
        text_end(text + layout.text),
        end(first + up(text_end - first, layout.align_modalities)) {}

  std::int64_t frame(std::int64_t index) const { return origin + index * frame_slots; }
};

void join(Spans& spans, Span span) {
  if (span.first == span.end) return;
  if (!spans.empty() && spans.back().end == span.first) {
    spans.back().end = span.end;
  } else {
    spans.push_back(span);
  }
}

// Keys of frames first..end-1, audio and text.
void visible_keys(const Place& place, std::int64_t first, std::int64_t end, Spans& keys) {
  keys.clear();
  if (place.frame_slots == place.frame_tokens) {
    join(keys, {place.frame(first), place.frame(end)});
  } else {
    for (std::int64_t f = first; f < end; ++f) join(keys, {place.frame(f), place.frame(f) + place.frame_tokens});
  }
  join(keys, {place.audio, place.audio_end});
  join(keys, {place.text, place.text_end});
}

}  // namespace

BlockMap frame_window(const std::vector<Layout>& layouts, std::optional<std::int64_t> receptive_field) {
  if (layouts.empty()) refuse("layouts must name at least one clip, got none");
  if (receptive_field && *receptive_field < 0) {
    refuse("receptive_field must be at least 0, got " + std::to_string(*receptive_field));
  }
  std::vector<Place> places;
  std::int64_t slots = 0;
  for (const Layout& layout : layouts) {
    check_size("frames", layout.frames);
    check_size("frame_tokens", layout.frame_tokens);
    check_size("audio", layout.audio);
    check_size("text", layout.text);
    slots = places.emplace_back(layout, slots).end;
    if (slots > MOST) {
      refuse("layouts must have at most " + std::to_string(MOST) + " slots, got at least " + std::to_string(slots));
    }
  }
  BlockMap map(slots, slots);
  Spans keys;
  for (const Place& place : places) {
    if (receptive_field && place.frame_tokens > 0) {
      const std::int64_t reach = std::min(*receptive_field, place.frames);
      for (std::int64_t f = 0; f < place.frames; ++f) {
        visible_keys(place, std::max<std::int64_t>(f - reach, 0), std::min(f + reach + 1, place.frames), keys);
        map.add(place.frame(f), place.frame(f + 1), keys);
      }
    }
    visible_keys(place, 0, place.frame_tokens > 0 ? place.frames : 0, keys);
    if (!receptive_field) map.add(place.origin, place.audio, keys);
    map.add(place.audio, place.end, keys);
  }
  map.finish();
  return map;
}

}  // namespace host
