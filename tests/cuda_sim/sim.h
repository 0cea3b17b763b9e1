// A GPU block on the CPU: runs a kernel's own source, with the instructions that `translate.py` maps to the
// functions below.  Threads are fibers; warp instructions wait for all 32 lanes and then move data as the PTX
// ISA says.  What real hardware would let pass silently is an error here:
//
//   race            two threads touch a word of shared memory between two barriers, one of them writing
//   in-flight       a word is touched while a cp.async to it has not been waited for
//   uninitialised   a word of shared memory is read that nothing wrote in this block
//   bounds          an access outside shared memory or outside (or across) tensors
//   misaligned      an access that is not aligned to its size
//   read-only       a store to an input, or a read-only load of an output
//   overwritten     two stores to one byte of an output
//   metadata        sparsity indices that are not ascending
//   bank-conflict   lanes that touch different words of one bank in one pass
//   divergence      lanes of a warp at different instructions, or threads gone while others wait
//   left-over       copies or products in flight when the kernel ends
//   proxy           wgmma reads a word that was written without a fence.proxy.async before the barrier
//   fence           wgmma without a wgmma.fence since the last group
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef _Float16 half;

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  explicit nv_bfloat16(float value) {
    uint32_t u;
    memcpy(&u, &value, 4);
    bool nan = (u & 0x7fffffffu) > 0x7f800000u;
    bits = nan ? 0x7fff : (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // round to nearest even
  }
  explicit operator float() const {
    uint32_t u = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &u, 4);
    return value;
  }
};

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

namespace sim {

struct Dim {
  unsigned x, y, z;
};

// An address can be formed from these, nothing can be read or written through them.
struct Place {
  uint8_t* address;
  void* operator&() const { return address; }
};

struct Bytes {
  uint8_t* data;
  Place operator[](int64_t offset) const { return {data + offset}; }
};

Bytes shared_memory();
uint32_t shared_address(const void* p);
const Dim& thread_index();
const Dim& block_index();

void barrier();
int shfl(int value, int source);
void cp_async(uint32_t target, const void* source, int size, uint32_t bytes);
void cp_async_commit();
void cp_async_wait(int pending);

// Each of these moves `count` registers of `size` bytes.
void load_shared(uint32_t address, uint32_t* registers, int count);
void store_shared(uint32_t address, const uint32_t* values, int count);
bool load_global(const void* address, void* values, int size, int count);
void store_global(const void* address, const void* values, int size, int count);

void ldmatrix(uint32_t address, uint32_t* registers, bool transposed);

enum class Element { fp16, bf16, s8, e4m3, e5m2 };
struct Mma {
  uint32_t a[4], b[4], c[4], e;
};
void mma(Element element, int selector, const Mma& in, uint32_t* out);

template <class T, class... Registers>
void ld_shared(uint32_t address, Registers&... registers) {
  static_assert(sizeof(T) == 4, "shadow words are 4 bytes");
  constexpr int count = sizeof...(Registers);
  uint32_t values[count];
  load_shared(address, values, count);
  const uint32_t* from = values;
  (memcpy(&registers, from++, 4), ...);
}

template <class T, class... Values>
void st_shared(uint32_t address, Values... values) {
  static_assert(sizeof(T) == 4, "shadow words are 4 bytes");
  uint32_t all[] = {(uint32_t)values...};
  store_shared(address, all, sizeof...(Values));
}

template <class T, class... Registers>
void ld_global(const void* address, Registers&... registers) {  // a wider register is filled with zeros
  T values[sizeof...(Registers)];
  if (!load_global(address, values, sizeof(T), sizeof...(Registers))) return;
  const T* from = values;
  ((registers = *from++), ...);
}

template <class T, class... Values>
void st_global(const void* address, Values... values) {
  T all[] = {(T)values...};
  store_global(address, all, sizeof(T), sizeof...(Values));
}

template <bool transposed>
void ldmatrix_x4(uint32_t address, uint32_t& r0, uint32_t& r1, uint32_t& r2, uint32_t& r3) {
  uint32_t out[4];
  ldmatrix(address, out, transposed);
  r0 = out[0], r1 = out[1], r2 = out[2], r3 = out[3];
}

template <Element element, int selector, class D>
void mma_sp(D& d0, D& d1, D& d2, D& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
            uint32_t b1, uint32_t b2, uint32_t b3, D c0, D c1, D c2, D c3, uint32_t e) {
  static_assert(sizeof(D) == 4, "registers have 4 bytes");
  static_assert(element == Element::fp16 || element == Element::bf16 ? selector < 2 : !selector, "selector");
  Mma in = {{a0, a1, a2, a3}, {b0, b1, b2, b3}, {}, e};
  D c[4] = {c0, c1, c2, c3}, out[4];
  memcpy(in.c, c, 16);
  mma(element, selector, in, (uint32_t*)out);
  d0 = out[0], d1 = out[1], d2 = out[2], d3 = out[3];
}

// Sums are not there before the wait: until then they hold a pattern that no test expects.
void wgmma(Element element, int n, int selector, const Mma& in, uint64_t descriptor, uint32_t* sums);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int pending);
void proxy_fence();

template <Element element, int n, int selector, class D>
void wgmma_sp(D* d, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint64_t descriptor, uint32_t e) {
  static_assert(sizeof(D) == 4, "registers have 4 bytes");
  static_assert(element == Element::fp16 || element == Element::bf16 ? selector < 2 : !selector, "selector");
  wgmma(element, n, selector, {{a0, a1, a2, a3}, {}, {}, e}, descriptor, (uint32_t*)d);
}

struct Run {
  void** data;
  const int64_t* sizes;
  const int* writable;
  int tensors;
  Dim grid;
  int threads, shared_bytes;
  char* report;
  int room;
};
int launch(void (*body)(), const Run& run);

}  // namespace sim

#define threadIdx (sim::thread_index())
#define blockIdx (sim::block_index())
inline void __syncthreads() { sim::barrier(); }
inline uint32_t __cvta_generic_to_shared(const void* p) { return sim::shared_address(p); }
inline int __shfl_sync(uint, int value, int source, int) { return sim::shfl(value, source); }
