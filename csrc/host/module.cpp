// happyhorse_fast._C: block maps for Python. It takes int64 arrays and returns int32 arrays.
//
// Input is copied before the GIL is released, since another thread may then write to the arrays. Errors are C++
// exceptions; pybind11 turns std::invalid_argument into a ValueError once it holds the GIL again.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>

#include "block_map.hpp"

namespace py = pybind11;

namespace {

using Out = py::array_t<std::int32_t>;

[[noreturn]] void refuse_type(const char* name, const py::handle& value) {
  std::string came = py::str(py::type::handle_of(value).attr("__name__"));
  if (py::isinstance<py::array>(value)) {
    came = std::string(py::str(value.attr("dtype"))) + " of shape " +
           std::string(py::str(py::list(value.attr("shape"))));
  }
  throw py::type_error(std::string(name) + " must be an int64 array of shape [rows, 2], got " + came);
}

host::Spans spans(const char* name, const py::handle& value) {
  if (!py::isinstance<py::array_t<std::int64_t>>(value)) refuse_type(name, value);
  const auto array = py::reinterpret_borrow<py::array>(value);
  if (array.ndim() != 2 || array.shape(1) != 2) refuse_type(name, value);
  host::Spans result(static_cast<std::size_t>(array.shape(0)));
  const auto* row = static_cast<const char*>(array.data());
  for (host::Span& span : result) {
    std::memcpy(&span.first, row, sizeof span.first);  // may be unaligned
    std::memcpy(&span.end, row + array.strides(1), sizeof span.end);
    row += array.strides(0);
  }
  return result;
}

py::tuple written(const host::BlockMap& map) {
  const py::ssize_t rows = map.rows(), entries = map.entries();
  Out counts({py::ssize_t{1}, rows, py::ssize_t{2}}), starts({py::ssize_t{1}, rows}), columns(entries),
      mask_ids(entries), order(rows);
  Out mask_bits({static_cast<py::ssize_t>(map.masks()), static_cast<py::ssize_t>(host::BLOCK),
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Block maps, made on the host without the GIL; see happyhorse_fast/_C.pyi.";
  m.def("from_ranges", &from_ranges, py::arg("q_ranges"), py::arg("k_ranges"), py::arg("queries"), py::arg("keys"));
}
