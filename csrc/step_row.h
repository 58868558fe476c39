// Where each coefficient of a sampler step stands in a row of the table; fastdiff/ops/row.py holds the same numbers.
#pragma once

namespace fastdiff::row {

enum Input { X, M, D, ANCHOR, HIST1, HIST2, HIST3, NOISE, INPUTS };

constexpr int SIZE = 32;
constexpr int GUIDANCE = 0;
constexpr int PREDICTION = 1;  // two: of x and of m
constexpr int CLIP = 3;
constexpr int NEW_X = 4;
constexpr int NEW_HISTORY = 12;
constexpr int NEW_ANCHOR = 20;
constexpr int INPUT_SCALE = 28;
constexpr int KNOWN = 29;  // two: of the image and of the noise
constexpr int VARIANCE = 31;

constexpr int STREAM_STEP = 1;
constexpr int STREAM_INITIAL = 0;

}  // namespace fastdiff::row
