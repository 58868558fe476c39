#include "winograd.h"

#include "winograd_product.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

int64_t winograd_scratch(const WinogradArgs& args) {
  return args.tile == 4 ? Winograd<WinogradFloat, 4>(args).scratch() : Winograd<WinogradFloat, 2>(args).scratch();
}

void winograd(const WinogradArgs& args) {
  args.tile == 4 ? Winograd<WinogradFloat, 4>(args).run() : Winograd<WinogradFloat, 2>(args).run();
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
