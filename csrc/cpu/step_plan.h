// A row of a StepTable as a step reads it.
#pragma once

#include "ops.h"
#include "step_row.h"
#include "step_sums.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

// What a row asks for, found once a call.
struct Plan {
  const float* row;
  uint32_t index;  // of the row, which is the noise's step
  Sum prediction;
  Sum combinations[3];  // x', history', anchor'
  bool needs[row::INPUTS];
  int data;     // the output that is D itself, 1 or 2; or 0
  bool varied;  // the noise is multiplied by a factor of the variance channels
};

Plan make_plan(const StepArgs& args) {
  Plan plan{};
  plan.index = static_cast<uint32_t>(args.row + (args.counter ? *args.counter : 0));
  plan.row = args.table + plan.index * row::SIZE;
  const Array* made[] = {&args.new_x, &args.new_history, &args.new_anchor};
  const int starts[] = {row::NEW_X, row::NEW_HISTORY, row::NEW_ANCHOR};
  const auto need = [&](const Sum& sum) {
    for (int term = 0; term < sum.terms; ++term) plan.needs[sum.inputs[term]] = true;
  };
  for (int i = 0; i < 3; ++i) {
    if (*made[i]) need(plan.combinations[i] = sum_of(plan.row + starts[i], row::INPUTS));
  }
  if (plan.needs[row::D]) need(plan.prediction = sum_of(plan.row + row::PREDICTION, 2));
  for (int i = 1; i < 3; ++i) {
    const Sum& sum = plan.combinations[i];
    if (made[i]->type == Type::F32 && sum.terms == 1 && sum.inputs[0] == row::D && sum.factors[0] == 1.0f) plan.data = i;
  }
  plan.varied = plan.needs[row::NOISE] && plan.row[row::VARIANCE] != 0.0f;
  return plan;
}

const char* missing_input(const StepArgs& args, const Plan& plan) {
  if (plan.needs[row::ANCHOR] && !args.anchor) return "anchor";
  if (plan.needs[row::HIST1] && !args.hist1) return "hist1";
  if (plan.needs[row::HIST2] && !args.hist2) return "hist2";
  if (plan.needs[row::HIST3] && !args.hist3) return "hist3";
  if (plan.needs[row::NOISE] && !args.noise && !args.seeds) return "noise";
  if (plan.varied && args.output_count == args.count) return "variance";
  if (args.mask && plan.row[row::KNOWN + 1] != 0.0f && !args.known_noise && !args.seeds) return "known_noise";
  return nullptr;
}

}  // namespace

}  // namespace fastdiff::cpu::CPU_CAPABILITY
