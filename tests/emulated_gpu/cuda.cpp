// A CUDA device whose memory and arithmetic are the CPU's: for a torch that was built for CPUs alone.
//
// What a GPU refuses, it refuses: operations on tensors of both devices, and, in the search for waits
// (torch.cuda.set_sync_debug_mode), whatever makes the CPU wait. It counts bytes as torch's allocator does,
// in blocks of 512. A process has one device, the LOCAL_RANK-th of EMULATED_GPUS, and may use no other, as
// well-behaved ranks do; the device has one stream, and nothing runs beside anything else.
// Source: torch's own example of a device of one's own (test/cpp_extensions/open_registration_extension).

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace {

using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::IntArrayRef;
using c10::Stream;

// ---------------------------------------------------------------------------------------------- device and memory

int number_in(const char* variable, int otherwise) {
  const char* text = std::getenv(variable);
  return text && *text ? std::atoi(text) : otherwise;
}

const DeviceIndex devices = number_in("EMULATED_GPUS", 1);
const Device gpu(DeviceType::CUDA, number_in("LOCAL_RANK", 0));
const Stream only(Stream::DEFAULT, gpu);
thread_local DeviceIndex current = 0;

DeviceIndex exchange(DeviceIndex other) {
  DeviceIndex before = current;
  if (other >= 0) current = other;
  return before;
}

void mine(DeviceIndex wanted) {
  TORCH_CHECK(wanted == gpu.index(), "memory on cuda:", int(wanted), ", which is not this rank's");
}

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device other) const override { return {DeviceType::CUDA, exchange(other.index())}; }
  Device getDevice() const override { return {DeviceType::CUDA, current}; }
  void setDevice(Device other) const override { exchange(other.index()); }
  void uncheckedSetDevice(Device other) const noexcept override { exchange(other.index()); }
  DeviceIndex deviceCount() const noexcept override { return devices; }
  Stream getStream(Device) const noexcept override { return only; }
  Stream getNewStream(Device, int) const override { return only; }
  Stream getDefaultStream(Device) const override { return only; }
  Stream exchangeStream(Stream) const noexcept override { return only; }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

struct CUDAHooks final : at::CUDAHooksInterface {  // torch asks for this name
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return devices; }
  int getNumGPUs() const override { return devices; }
  DeviceIndex current_device() const override { return current; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex other) const override { exchange(other); }
  DeviceIndex exchangeDevice(DeviceIndex other) const override { return exchange(other); }
  DeviceIndex maybeExchangeDevice(DeviceIndex other) const override { return exchange(other); }
  void deviceSynchronize(DeviceIndex) const override {}
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetAllocator(DeviceType::CPU); }
};
using at::CUDAHooksArgs;
using at::CUDAHooksInterface;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
REGISTER_CUDA_HOOKS(CUDAHooks);

constexpr int64_t BLOCK = 512;
std::atomic<int64_t> held{0}, most{0};

void give_back(void* data) {
  if (!data) return;
  char* block = static_cast<char*>(data) - BLOCK;  // its size is kept before it
  held -= *reinterpret_cast<int64_t*>(block);
  std::free(block);
}

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (!bytes) return {nullptr, nullptr, &give_back, gpu};
    int64_t size = (static_cast<int64_t>(bytes) + BLOCK - 1) / BLOCK * BLOCK;
    char* block = static_cast<char*>(std::aligned_alloc(BLOCK, size + BLOCK));
    TORCH_CHECK(block, "no memory");
    *reinterpret_cast<int64_t*>(block) = size;
    int64_t now = held += size, was = most;
    while (was < now && !most.compare_exchange_weak(was, now)) {
    }
    return {block + BLOCK, block + BLOCK, &give_back, gpu};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &give_back; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
};
Memory memory;
REGISTER_ALLOCATOR(DeviceType::CUDA, &memory);

// -------------------------------------------------------------------------------------------------------- waits

int mode = 0;  // of the search for waits: off, warn, error

void waits(const char* what) {
  if (mode == 2) TORCH_CHECK(false, "called a synchronizing CUDA operation: ", what);
  if (mode == 1) TORCH_WARN("called a synchronizing CUDA operation: ", what);
}

struct Unseen {  // whatever waits within its life is the emulation's
  int was = mode;
  Unseen() { mode = 0; }
  ~Unseen() { mode = was; }
};

// -------------------------------------------------------------------------------------- operations of the device's own

constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::CUDA);

Tensor on_cpu(const Tensor& tensor) {  // the same memory
  if (tensor.is_cpu()) return tensor;
  Tensor same = at::from_blob(tensor.mutable_data_ptr(), tensor.sizes(), tensor.strides(),
                              tensor.options().device(at::kCPU).requires_grad(false));
  return tensor.is_neg() ? same._neg_view() : same;
}

Tensor empty(IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  mine(device && device->has_index() ? device->index() : current);
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(IntArrayRef size, IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                     std::optional<c10::Layout>, std::optional<Device> device, std::optional<bool>) {
  mine(device && device->has_index() ? device->index() : current);
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, c10::dtype_or_default(dtype));
}

Tensor& copy_(Tensor& to, const Tensor& from, bool non_blocking) {
  if (!to.numel()) return to;
  if (!non_blocking && to.device() != from.device()) waits("copy_");
  on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool) {
  if (from.numel()) on_cpu(to).copy_(on_cpu(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

void resize_storage(const Tensor& self, int64_t size) {
  auto* storage = self.storage().unsafeGetStorageImpl();
  size_t bytes = size;
  auto other = memory.allocate(bytes);
  if (size_t kept = std::min(bytes, storage->nbytes())) std::memcpy(other.get(), storage->data(), kept);
  storage->set_data_ptr_noswap(std::move(other));
  storage->set_nbytes(bytes);
}

const Tensor& resize_(const Tensor& self, IntArrayRef size, std::optional<c10::MemoryFormat>) {
  size_t bytes = (c10::multiply_integers(size) + self.storage_offset()) * self.itemsize();
  if (self.storage().nbytes() < bytes) resize_storage(self, bytes);
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor& set_part(Tensor& self, at::Storage storage, int64_t offset, IntArrayRef size, IntArrayRef stride) {
  c10::DimVector strides(stride.begin(), stride.end());
  if (strides.empty()) strides = c10::contiguous_strides(size);
  self.unsafeGetTensorImpl()->set_storage_keep_dtype(storage);
  self.unsafeGetTensorImpl()->set_sizes_and_strides(size, strides, offset);
  return self;
}

Tensor& set_storage(Tensor& self, at::Storage storage) {
  int64_t n = storage.nbytes() / self.itemsize();
  return set_part(self, storage, 0, {n}, {1});
}

Tensor& set_tensor(Tensor& self, const Tensor& other) {
  return set_part(self, other.storage(), other.storage_offset(), other.sizes(), other.strides());
}

Tensor& set_none(Tensor& self) { return set_tensor(self, at::empty({0}, self.options())); }

at::Scalar number(const Tensor& self) {
  waits("item");
  return at::_local_scalar_dense(on_cpu(self));
}

bool is_pinned(const Tensor&, std::optional<Device>) { return false; }

int64_t plain_attention(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool,
                        std::optional<double>, bool) {
  return 0;
}

Tensor widened(const Tensor& x) {  // of 16 bits into fp32, which the CPU multiplies faster, and its softmax refuses
  Tensor here = on_cpu(x);
  return at::isReducedFloatingType(here.scalar_type()) ? here.to(at::kFloat) : here;
}

Tensor there(const Tensor& made, c10::ScalarType dtype) {
  Unseen unseen;
  return made.to(gpu, dtype);
}

void same_device(const Tensor& a, const Tensor& b) {
  TORCH_CHECK(a.is_cuda() && b.is_cuda(), "Expected all tensors to be on the same device, cuda:0 and cpu");
}

Tensor mm(const Tensor& a, const Tensor& b) {
  same_device(a, b);
  return there(at::mm(widened(a), widened(b)), a.scalar_type());
}

Tensor bmm(const Tensor& a, const Tensor& b) {
  same_device(a, b);
  return there(at::bmm(widened(a), widened(b)), a.scalar_type());
}

Tensor addmm(const Tensor& c, const Tensor& a, const Tensor& b, const at::Scalar& beta, const at::Scalar& alpha) {
  same_device(a, b);
  same_device(a, c);
  return there(at::addmm(widened(c), widened(a), widened(b), beta, alpha), a.scalar_type());
}

Tensor softmax(const Tensor& x, int64_t dim, bool widen) {
  return there(at::_softmax(widened(x), dim, false), widen ? at::kFloat : x.scalar_type());
}

Tensor log_softmax(const Tensor& x, int64_t dim, bool widen) {
  return there(at::_log_softmax(widened(x), dim, false), widen ? at::kFloat : x.scalar_type());
}

Tensor softmax_backward(const Tensor& grad, const Tensor& y, int64_t dim, c10::ScalarType dtype) {
  return there(at::_softmax_backward_data(on_cpu(grad), on_cpu(y), dim, y.scalar_type()), dtype);
}

Tensor log_softmax_backward(const Tensor& grad, const Tensor& y, int64_t dim, c10::ScalarType dtype) {
  return there(at::_log_softmax_backward_data(on_cpu(grad), on_cpu(y), dim, y.scalar_type()), dtype);
}

// ------------------------------------------------------------------------------------------------- everything else

void by_the_cpu(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const std::string& name = op.schema().name();
  bool here = false, there = false;
  auto look = [&](const Tensor& tensor) {
    if (!tensor.defined()) return;
    here = here || tensor.is_cuda();
    there = there || (tensor.is_cpu() && tensor.dim() > 0);  // numbers may be anywhere
  };
  for (const auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor()) look(value.toTensor());
    if (value.isTensorList())
      for (const Tensor& tensor : value.toTensorVector()) look(tensor);
  }
  bool indexes = name.rfind("aten::index", 0) == 0 || name.rfind("aten::_index_put", 0) == 0;  // indices may be, too
  TORCH_CHECK(!(here && there) || indexes, name, ": Expected all tensors to be on the same device, cuda:0 and cpu");
  for (const char* slow : {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal", "aten::bincount"})
    if (name == slow) waits(slow);
  Unseen unseen;
  at::native::cpu_fallback(op, stack);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&by_the_cpu>()); }

TORCH_LIBRARY(emulated, m) { m.def("resize_storage(Tensor self, int size) -> ()", resize_storage); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("copy_", copy_);
  m.impl("_copy_from", copy_from);
  m.impl("_copy_from_and_resize", copy_from_and_resize);
  m.impl("resize_", resize_);
  m.impl("set_.source_Storage_storage_offset", set_part);
  m.impl("set_.source_Storage", set_storage);
  m.impl("set_.source_Tensor", set_tensor);
  m.impl("set_", set_none);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("_reshape_alias", at::native::_reshape_alias);
  m.impl("unfold", at::native::unfold);
  m.impl("view_as_real", at::native::view_as_real);
  m.impl("is_pinned", is_pinned);
  m.impl("_local_scalar_dense", number);
  m.impl("_fused_sdp_choice", plain_attention);
  m.impl("mm", mm);
  m.impl("bmm", bmm);
  m.impl("addmm", addmm);
  m.impl("_softmax", softmax);
  m.impl("_log_softmax", log_softmax);
  m.impl("_softmax_backward_data", softmax_backward);
  m.impl("_log_softmax_backward_data", log_softmax_backward);
}

}  // namespace

extern "C" {
int current_device() { return current; }
int exchange_device(int other) { return exchange(other); }
int64_t bytes_held() { return held; }
int64_t bytes_at_most() { return most; }
void forget_the_most() { most = held.load(); }
void look_for_waits(int wanted) { mode = wanted; }
int looks_for_waits() { return mode; }
}
