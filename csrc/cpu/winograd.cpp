#include "winograd.h"

#include "winograd_product.h"

namespace fastdiff::cpu::CPU_CAPABILITY {

namespace {

// use(the convolution that the arguments describe).
template <class Element, class Use>
auto in_tiles(const WinogradArgs& args, const Use& use) {
  return args.tile == 4 ? use(Winograd<WinogradWide<Element>, 4>(args)) : use(Winograd<WinogradWide<Element>, 2>(args));
}

template <class Use>
auto with(const WinogradArgs& args, const Use& use) {
  return args.type == Type::F32 ? in_tiles<float>(args, use) : in_tiles<uint16_t>(args, use);
}

}  // namespace

int64_t winograd_scratch(const WinogradArgs& args) {
  return with(args, [](const auto& found) { return found.scratch(); });
}

void winograd(const WinogradArgs& args) {
  with(args, [](auto&& found) { found.run(); });
}

}  // namespace fastdiff::cpu::CPU_CAPABILITY
