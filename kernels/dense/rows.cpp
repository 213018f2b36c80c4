// The products of product.h for Python.

#include "product.h"

// x [rows, inputs], weight [outputs, inputs], bias [outputs] or null → y [rows, outputs].
extern "C" void dense_rows(const uint16_t* x, const uint16_t* weight, const uint16_t* bias, int64_t rows,
                           int64_t outputs, int64_t inputs, uint16_t* y) {
  multiply_rows({x, weight, bias, rows, outputs, inputs, y});
}
