// Whether hundreds of tensors are as they were. Asked before every skipped step, when hardly any of them is in
// a cache of the processor: a loop that waits for many at a time takes a fraction of one of Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace hicache {

// Functions of torch's library, by their addresses: nothing here is compiled with torch. A tensor is a pointer
// to an at::Tensor, which is itself one to what torch has of it.
using tensor = const void* const*;
using address_of = int32_t (*)(tensor, uint64_t* address);  // aoti_torch_get_data_ptr of its C interface
using writes_to = int64_t (*)(tensor);                      // at::TensorBase::_version

inline void prefetch(const void* place) {
#if defined(__GNUC__)
  __builtin_prefetch(place);
#else
  (void)place;
#endif
}

// Brings lines of what an object of so many bytes points to; numbers in it that are no addresses do no harm.
inline void fetch(const void* object, size_t size, size_t lines) {
  const auto* words = static_cast<const void* const*>(object);
  for (size_t word = 2; word < size / sizeof(void*); ++word) {  // after a type and a count
    for (size_t line = 0; line < lines; ++line) prefetch(static_cast<const char*>(words[word]) + 64 * line);
  }
}

constexpr int64_t kAhead = 16;      // objects that are on their way while one is looked at
constexpr size_t kTensorHead = 64;  // bytes of what torch has of a tensor that point to storage and counts

// Whether tensors are where they were, and the first of them, which are counted, as often written to.
inline bool unchanged(const tensor* tensors, int64_t count, const uint64_t* addresses, int64_t counted,
                      const uint64_t* writes, address_of address, writes_to write) {
  for (int64_t index = 0; index < count; ++index) {
    if (index + 2 * kAhead < count) {
      const auto* next = static_cast<const char*>(*tensors[index + 2 * kAhead]);
      for (int line = 0; line < 3; ++line) prefetch(next + 64 * line);
    }
    if (index + kAhead < count) fetch(*tensors[index + kAhead], kTensorHead, 1);
    uint64_t place = 0;
    if (address(tensors[index], &place) != 0 || place != addresses[index]) return false;
    if (index < counted && static_cast<uint64_t>(write(tensors[index])) != writes[index]) return false;
  }
  return true;
}

}  // namespace hicache
