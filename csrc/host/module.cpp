// happyhorse_fast._C: block maps and schedules for Python. int64 arrays come in, int32 arrays go out.
//
// Input is copied before the GIL is released: another thread may write to an array while its copy is being checked and
// used. Errors are C++ exceptions until pybind11 has the GIL again: std::invalid_argument becomes a ValueError.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>

#include "frame_window.hpp"
#include "from_ranges.hpp"
#include "schedule.hpp"

namespace py = pybind11;

namespace {

using Out = py::array_t<std::int32_t>;

[[noreturn]] void refuse_type(const char* name, const char* wanted, const py::handle& value) {
  std::string came = py::str(py::type::handle_of(value).attr("__name__"));
  if (py::isinstance<py::array>(value)) {
    came = std::string(py::str(value.attr("dtype"))) + " of shape " +
           std::string(py::str(py::list(value.attr("shape"))));
  }
  throw py::type_error(std::string(name) + " must be an int64 array of shape " + wanted + ", got " + came);
}

// The elements of an int64 array [n], or [n, columns] where columns > 0, row by row.
std::vector<std::int64_t> copied(const char* name, const py::handle& value, py::ssize_t columns, const char* wanted) {
  if (!py::isinstance<py::array_t<std::int64_t>>(value)) refuse_type(name, wanted, value);
  const auto array = py::reinterpret_borrow<py::array>(value);
  const py::ssize_t dims = columns > 0 ? 2 : 1;
  if (array.ndim() != dims || (columns > 0 && array.shape(1) != columns)) refuse_type(name, wanted, value);
  const py::ssize_t rows = array.shape(0), width = columns > 0 ? columns : 1;
  std::vector<std::int64_t> elements(static_cast<std::size_t>(rows * width));
  const auto* const source = static_cast<const char*>(array.data());
  for (py::ssize_t i = 0; i < rows; ++i) {
    for (py::ssize_t j = 0; j < width; ++j) {
      const char* const place = source + i * array.strides(0) + (columns > 0 ? j * array.strides(1) : 0);
      std::memcpy(&elements[static_cast<std::size_t>(i * width + j)], place, sizeof(std::int64_t));  // may be unaligned
    }
  }
  return elements;
}

host::Spans spans(const char* name, const py::handle& value) {
  const std::vector<std::int64_t> flat = copied(name, value, 2, "[rows, 2]");
  host::Spans result;
  result.reserve(flat.size() / 2);
  for (std::size_t i = 0; i < flat.size(); i += 2) result.push_back({flat[i], flat[i + 1]});
  return result;
}

py::tuple written(const host::BlockMap& map) {
  const py::ssize_t rows = map.rows(), entries = map.entries();
  Out counts({py::ssize_t{1}, rows, py::ssize_t{2}}), starts({py::ssize_t{1}, rows}), columns(entries),
      mask_ids(entries), order(rows);
  Out mask_bits({static_cast<py::ssize_t>(map.masks().size()), static_cast<py::ssize_t>(host::BLOCK),
                 py::ssize_t{host::WORDS}});
  const host::BlockMapArrays arrays{counts.mutable_data(),   starts.mutable_data(),    columns.mutable_data(),
                                    mask_ids.mutable_data(), mask_bits.mutable_data(), order.mutable_data()};
  {
    const py::gil_scoped_release release;
    map.write(arrays);
  }
  return py::make_tuple(counts, starts, columns, mask_ids, mask_bits, order);
}

py::tuple from_ranges(const py::object& q_ranges, const py::object& k_ranges, std::int64_t queries, std::int64_t keys) {
  const host::Spans q = spans("q_ranges", q_ranges), k = spans("k_ranges", k_ranges);
  const host::BlockMap map = [&] {
    const py::gil_scoped_release release;
    return host::from_ranges(q, k, queries, keys);
  }();
  return written(map);
}

py::tuple frame_window(const py::object& layouts, std::optional<std::int64_t> receptive_field) {
  const std::vector<std::int64_t> flat = copied("layouts", layouts, 6, "[clips, 6]");
  std::vector<host::Layout> clips;
  for (std::size_t i = 0; i < flat.size(); i += 6) {
    clips.push_back({flat[i], flat[i + 1], flat[i + 2], flat[i + 3], flat[i + 4] != 0, flat[i + 5] != 0});
  }
  const host::BlockMap map = [&] {
    const py::gil_scoped_release release;
    return host::frame_window(clips, receptive_field);
  }();
  return written(map);
}

Out array_of(const std::vector<std::int32_t>& values) {
  return Out(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple schedule(const py::object& lengths, std::int64_t programs, std::int64_t query_heads) {
  const std::vector<std::int64_t> blocks = copied("lengths", lengths, 0, "[rows]");
  const host::Schedule result = [&] {
    const py::gil_scoped_release release;
    return host::schedule(blocks, programs, query_heads);
  }();
  return py::make_tuple(array_of(result.order), array_of(result.starts), array_of(result.items));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Block maps and schedules, made on the host without the GIL. happyhorse_fast/_C.pyi says what each returns.";
  m.def("from_ranges", &from_ranges, py::arg("q_ranges"), py::arg("k_ranges"), py::arg("queries"), py::arg("keys"));
  m.def("frame_window", &frame_window, py::arg("layouts"), py::arg("receptive_field").none(true));
  m.def("schedule", &schedule, py::arg("lengths"), py::arg("programs"), py::arg("query_heads") = 1);
}
