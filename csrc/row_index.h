// Which row of a table a call reads; on the CPU a wrong one is an error.
#pragma once

#include <string>

#include "tensors.h"

namespace fastdiff {

[[noreturn]] inline void input_error(const std::string& message) {
  const py::object type = py::module_::import("fastdiff.errors").attr("InputError");
  PyErr_SetString(type.ptr(), message.c_str());
  throw py::error_already_set();
}

// row + counter.
inline int64_t row_index(const std::string& name, int64_t row, const int64_t* counter, int64_t rows) {
  const int64_t index = row + (counter ? *counter : 0);
  if (index < 0 || index >= rows) {
    input_error(name + ": row + counter = " + std::to_string(index) + " is outside the table's " +
                std::to_string(rows) + " rows");
  }
  return index;
}

}  // namespace fastdiff
