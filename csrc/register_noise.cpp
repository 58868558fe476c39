// Tensors in, raw pointers to the kernels, tensors out: noise. Arguments were checked in fastdiff/ops.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>

#include <mutex>

#include "tensors.h"

namespace fastdiff {

namespace {

NoiseArgs noise_args(const Tensor& out, const OptionalTensor& seeds, int64_t step, int64_t stream) {
  NoiseArgs args{};
  args.samples = out.size(0);
  args.count = out.size(0) == 0 ? 0 : out.numel() / out.size(0);
  args.inner = inner_of(out);
  args.seeds = integers(seeds);
  args.step = static_cast<uint32_t>(step);
  args.stream = static_cast<uint32_t>(stream);
  args.out = array(out);
  args.threads = at::get_num_threads();
  return args;
}

Tensor add_noise(const Tensor& x, const Tensor& alpha, const Tensor& sigma, const OptionalTensor& noise,
                 const OptionalTensor& seeds, int64_t step, int64_t stream) {
  const Tensor source = dense(x);
  const Tensor out = at::empty(source.sizes(), source.options(), layout_of(source));
  const OptionalTensor z = noise ? OptionalTensor(noise->contiguous(layout_of(source))) : noise;
  NoiseArgs args = noise_args(out, seeds, step, stream);
  args.x = array(source);
  args.noise = array(z);
  args.alpha = alpha.const_data_ptr<float>();
  args.sigma = sigma.const_data_ptr<float>();
  if (out.numel() == 0) return out;
  LAUNCH(add_noise, x, args) ON_CPU(add_noise, args);
  return out;
}

Tensor philox_normal(const Tensor& seeds, const std::vector<int64_t>& shape, int64_t step, int64_t stream,
                     at::ScalarType dtype) {
  const Tensor out = at::empty(shape, seeds.options().dtype(dtype));
  const NoiseArgs args = noise_args(out, seeds, step, stream);
  if (out.numel() == 0) return out;
  LAUNCH(philox_normal, seeds, args) ON_CPU(philox_normal, args);
  return out;
}

// x + e s + sqrt(2 e) z, float32, of tensors of one shape on the CPU.
Tensor langevin_correct(const Tensor& x, const Tensor& score, const Tensor& noise, double snr) {
  const Tensor state = x.contiguous(), s = score.contiguous(), z = noise.contiguous();
  const Tensor out = at::detail::empty_cpu(x.sizes(), at::kFloat);
  CorrectArgs args{x.size(0), x.numel() / x.size(0), array(state), array(s), array(z), snr};
  args.out = out.mutable_data_ptr<float>();
  args.threads = at::get_num_threads();
  ON_CPU(langevin_correct, args);
  return out;
}

// torch.randn(shape, generator, dtype), bit for bit, on a processor with AVX2; the generator moves on alike.
Tensor torch_normal(const std::optional<at::Generator>& generator, const std::vector<int64_t>& shape,
                    at::ScalarType dtype) {
  const at::Generator chosen = generator ? *generator : at::detail::getDefaultCPUGenerator();
  auto* own = chosen.get<at::CPUGeneratorImpl>();
  // Without PyTorch's dispatcher, which takes longer than the memory does.
  const Tensor out = at::detail::empty_cpu(shape, dtype);
  const Tensor values = dtype == at::kFloat ? out : Tensor(at::detail::empty_cpu(shape, at::kFloat));
  const std::lock_guard<std::mutex> lock(own->mutex_);
  at::mt19937 engine = own->engine();
  at::mt19937_data_pod data = engine.data();
  constexpr int words = at::MERSENNE_STATE_N;
  MersenneTwister twister{data.state_.data(), data.left_ == 1 ? words : static_cast<int>(data.next_)};
  TorchNormalArgs args{&twister, out.numel(), values.data_ptr<float>(), array(out), at::get_num_threads()};
  ON_CPU(torch_normal, args);
  data.next_ = static_cast<uint32_t>(twister.next);
  data.left_ = words - twister.next + 1;
  engine.set_data(data);
  own->set_engine(engine);
  return out;
}

}  // namespace

void register_noise(py::module_& m) {
  m.def("add_noise", &add_noise);
  m.def("philox_normal", &philox_normal);
  m.def("torch_normal", &torch_normal);
  m.def("langevin_correct", &langevin_correct);
}

}  // namespace fastdiff
