// The machine behind sim.h; compiled once, while every kernel includes only the header.
#include "sim.h"

#include <stdarg.h>
#include <stdio.h>
#include <ucontext.h>

#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

namespace sim {

struct Stop : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Tensors and memory ------------------------------------------------------------------------------------

struct Tensor {
  uint8_t* data;
  int64_t size;
  bool writable;
  std::vector<uint8_t> written;
};

struct Word {  // shadow of 4 bytes of shared memory
  int write_epoch = -1, writer = -1;
  int read_epoch = -1, reader_warp = -1;  // -2: several warps
  int in_flight = 0;
  int multiplied = 0;   // products in flight that read it
  long write_time = 0;  // of the writing thread's clock
  bool initialised = false;
};

struct Copy {
  uint32_t target;
  const uint8_t* source;
  int size, bytes;
};

enum class At { running, barrier, collective, done };

struct Collective {
  const char* name = nullptr;
  void (*run)(int warp) = nullptr;
};

struct Product {  // a wgmma in flight
  uint32_t* sums;
  std::vector<uint32_t> result;
  std::vector<uint32_t> words;  // of shared memory, counted once for the warpgroup
};

struct Thread {
  ucontext_t context;
  std::vector<char> stack;
  Dim index;
  At at;
  Collective collective;
  const void* in;
  void* out;
  uint32_t address;
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
  std::vector<Product> products;
  std::vector<std::vector<Product>> product_groups;
  long clock = 1, proxy_time = 0;
  bool fenced = false;
  std::map<std::pair<const char*, int>, int> accesses;  // how often each kind of access came since a barrier
};

struct Access {
  int lane;
  uint32_t address;
};

static std::vector<Tensor> tensors;
static std::vector<uint8_t> shared;
static std::vector<Word> words;
static std::vector<Thread> threads;
static std::map<std::tuple<int, const char*, int, int>, std::vector<Access>> bank_log;  // warp, kind, size, turn
static Thread* current;
static int self, epoch, block_threads;
static Dim block, grid;
static ucontext_t scheduler;
static std::map<std::string, long> errors;
static std::string first_errors;
static std::map<std::string, long> counts;

static void error(const char* kind, const char* format, ...) {
  if (errors[kind]++ >= 3) return;
  char text[256], line[384];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(line, sizeof line, "%s: %s (block %u,%u,%u thread %d)\n", kind, text, block.x, block.y, block.z, self);
  first_errors += line;
}

const Dim& thread_index() { return current->index; }
const Dim& block_index() { return block; }
Bytes shared_memory() { return {shared.data()}; }

uint32_t shared_address(const void* p) { return uint32_t((const uint8_t*)p - shared.data()); }

static bool shared_inside(const char* what, uint32_t address, int size) {
  if (address % size) {
    error("misaligned", "%s of %d bytes at shared+%u", what, size, address);
    return false;
  }
  if (uint64_t(address) + size > shared.size()) {
    error("bounds", "%s of %d bytes at shared+%u of %zu", what, size, address, shared.size());
    return false;
  }
  return true;
}

static void note_read(const char* what, uint32_t address, int size) {
  for (uint32_t w = address / 4; w < (address + size) / 4; w++) {
    Word& word = words[w];
    if (word.in_flight) error("in-flight", "%s of shared+%u", what, w * 4);
    else if (!word.initialised) error("uninitialised", "%s of shared+%u", what, w * 4);
    if (word.write_epoch == epoch && word.writer != self)
      error("race", "%s of shared+%u, which thread %d wrote", what, w * 4, word.writer);
    int warp = self / 32;
    word.reader_warp = word.read_epoch != epoch || word.reader_warp == warp ? warp : -2;
    word.read_epoch = epoch;
  }
}

static void note_write(const char* what, uint32_t address, int size) {
  for (uint32_t w = address / 4; w < (address + size) / 4; w++) {
    Word& word = words[w];
    if (word.in_flight) error("in-flight", "%s of shared+%u", what, w * 4);
    if (word.multiplied) error("race", "%s of shared+%u, which a product in flight reads", what, w * 4);
    word.write_time = current->clock++;
    if (word.read_epoch == epoch && word.reader_warp != self / 32)
      error("race", "%s of shared+%u, which another warp read", what, w * 4);
    if (word.write_epoch == epoch && word.writer != self)
      error("race", "%s of shared+%u, which thread %d wrote", what, w * 4, word.writer);
    word.write_epoch = epoch;
    word.writer = self;
    word.initialised = true;
  }
}

static void note_banks(const char* kind, uint32_t address, int size) {
  int turn = current->accesses[{kind, size}]++;
  bank_log[{self / 32, kind, size, turn}].push_back({self % 32, address});
}

// A pass of 128 bytes serves 32, 16 or 8 consecutive lanes; each bank gives one word a pass.
static void check_banks() {
  for (auto& [key, accesses] : bank_log) {
    auto& [warp, kind, size, turn] = key;
    int lanes = 128 / size;
    std::map<std::pair<int, int>, uint32_t> served;  // (pass, bank) -> word
    for (auto& access : accesses)
      for (int i = 0; i < size / 4; i++) {
        uint32_t word = access.address / 4 + i;
        auto [found, fresh] = served.insert({{access.lane / lanes, int(word % 32)}, word});
        if (!fresh && found->second != word) {
          error("bank-conflict", "%s of %d bytes, warp %d, bank %u", kind, size, warp, word % 32);
          goto next;
        }
      }
  next:;
  }
  bank_log.clear();
}

static Tensor* tensor_of(const char* what, const void* p, int size, bool writing) {
  auto address = (const uint8_t*)p;
  if ((uintptr_t)p % size) {
    error("misaligned", "%s of %d bytes of global memory", what, size);
    return nullptr;
  }
  for (auto& tensor : tensors)
    if (address >= tensor.data && address + size <= tensor.data + tensor.size) {
      if (tensor.writable != writing) error("read-only", "%s of an %s", what, writing ? "input" : "output");
      return &tensor;
    }
  error("bounds", "%s of %d bytes outside every tensor", what, size);
  return nullptr;
}

// Scheduling --------------------------------------------------------------------------------------------

static void wait_here(At at) {
  current->at = at;
  swapcontext(&current->context, &scheduler);
}

static void collective(const char* name, void (*run)(int), const void* in, void* out, uint32_t address = 0) {
  current->collective = {name, run};
  current->in = in;
  current->out = out;
  current->address = address;
  wait_here(At::collective);
}

void barrier() { wait_here(At::barrier); }

// cp.async (PTX ISA, Data Movement: non-bulk copy) --------------------------------------------------------

void cp_async(uint32_t target, const void* source, int size, uint32_t bytes) {
  counts["cp.async"]++;
  if (!shared_inside("cp.async", target, size)) return;
  if (bytes > uint32_t(size)) return error("bounds", "cp.async of %u bytes into %d", bytes, size);
  if (bytes && (uintptr_t)source % size) error("misaligned", "cp.async of %d bytes from global memory", size);
  else if (bytes && !tensor_of("cp.async", source, bytes, false)) return;
  note_banks("cp.async", target, size);
  for (uint32_t w = target / 4; w < (target + size) / 4; w++) {
    Word& word = words[w];
    if (word.in_flight) error("in-flight", "cp.async over another to shared+%u", w * 4);
    if (word.multiplied) error("race", "cp.async to shared+%u, which a product in flight reads", w * 4);
    if (word.read_epoch == epoch && word.reader_warp != self / 32)
      error("race", "cp.async to shared+%u, which another warp read", w * 4);
    if (word.write_epoch == epoch && word.writer != self)
      error("race", "cp.async to shared+%u, which thread %d wrote", w * 4, word.writer);
    word.in_flight++;
  }
  current->open.push_back({target, (const uint8_t*)source, size, int(bytes)});
}

void cp_async_commit() {
  current->groups.push_back(std::move(current->open));
  current->open.clear();
}

void cp_async_wait(int pending) {  // nothing is copied before it is waited for
  auto& groups = current->groups;
  while (int(groups.size()) > pending) {
    for (auto& copy : groups.front()) {
      for (uint32_t w = copy.target / 4; w < (copy.target + copy.size) / 4; w++) words[w].in_flight--;
      memset(&shared[copy.target], 0, copy.size);
      memcpy(&shared[copy.target], copy.source, copy.bytes);
      note_write("cp.async", copy.target, copy.size);
    }
    groups.erase(groups.begin());
  }
}

// Loads and stores ----------------------------------------------------------------------------------------

void load_shared(uint32_t address, uint32_t* registers, int count) {
  int size = 4 * count;
  memset(registers, 0xff, size);
  if (!shared_inside("ld.shared", address, size)) return;
  note_read("ld.shared", address, size);
  note_banks("ld.shared", address, size);
  memcpy(registers, &shared[address], size);
}

void store_shared(uint32_t address, const uint32_t* values, int count) {
  int size = 4 * count;
  if (!shared_inside("st.shared", address, size)) return;
  note_write("st.shared", address, size);
  note_banks("st.shared", address, size);
  memcpy(&shared[address], values, size);
}

bool load_global(const void* address, void* values, int size, int count) {
  if (!tensor_of("ld.global", address, size * count, false)) return false;
  memcpy(values, address, size * count);
  return true;
}

void store_global(const void* address, const void* values, int size, int count) {
  size *= count;
  Tensor* tensor = tensor_of("st.global", address, size, true);
  if (!tensor || !tensor->writable) return;
  int64_t start = (const uint8_t*)address - tensor->data;
  for (int i = 0; i < size; i++)
    if (tensor->written[start + i]++) error("overwritten", "st.global of byte %ld", long(start + i));
  memcpy(tensor->data + start, values, size);
}

// Warp instructions -----------------------------------------------------------------------------------------

static Thread* lanes(int warp) { return &threads[warp * 32]; }

// ldmatrix.m8n8.x4: lanes 8j to 8j+7 give the rows of matrix j; lane l gets elements 2(l%4), 2(l%4)+1 of row
// l/4 of each, or of column l/4 with .trans (PTX ISA, Warp-level matrix load).
template <bool transposed>
static void run_ldmatrix(int warp) {
  Thread* lane = lanes(warp);
  counts["ldmatrix"]++;
  for (int j = 0; j < 4; j++) {
    bool used[8] = {}, conflict = false, good = true;
    for (int r = 0; r < 8; r++) {
      uint32_t address = lane[8 * j + r].address;
      self = warp * 32 + 8 * j + r;
      if (!shared_inside("ldmatrix", address, 16)) { good = false; continue; }
      note_read("ldmatrix", address, 16);
      conflict |= used[address / 16 % 8];
      used[address / 16 % 8] = true;
    }
    if (conflict) error("bank-conflict", "ldmatrix, matrix %d", j);
    if (!good) continue;
    for (int l = 0; l < 32; l++)
      for (int q = 0; q < 2; q++) {
        int row = transposed ? 2 * (l % 4) + q : l / 4, column = transposed ? l / 4 : 2 * (l % 4) + q;
        memcpy((uint8_t*)lane[l].out + 4 * j + 2 * q, &shared[lane[8 * j + row].address + 2 * column], 2);
      }
  }
}

void ldmatrix(uint32_t address, uint32_t* registers, bool transposed) {
  memset(registers, 0xff, 16);
  collective("ldmatrix", transposed ? run_ldmatrix<true> : run_ldmatrix<false>, nullptr, registers, address);
}

struct Fp16 {
  static constexpr int size = 2;
  typedef float sum;
  static float value(const uint8_t* p) { half h; memcpy(&h, p, 2); return float(h); }
};
struct Bf16 {
  static constexpr int size = 2;
  typedef float sum;
  static float value(const uint8_t* p) { nv_bfloat16 b; memcpy(&b, p, 2); return float(b); }
};
struct S8 {
  static constexpr int size = 1;
  typedef int32_t sum;
  static int32_t value(const uint8_t* p) { return int8_t(*p); }
};
template <int exponent, int mantissa, bool infinities>
struct Fp8 {
  static constexpr int size = 1;
  typedef float sum;
  static float value(const uint8_t* p) {
    int e = (*p & 0x7f) >> mantissa, m = *p & ((1 << mantissa) - 1), bias = (1 << (exponent - 1)) - 1;
    float v = e ? std::ldexp(1.0f + float(m) / (1 << mantissa), e - bias)
                : std::ldexp(float(m) / (1 << mantissa), 1 - bias);
    if (infinities && e == (1 << exponent) - 1) v = m ? NAN : INFINITY;
    if (!infinities && (*p & 0x7f) == 0x7f) v = NAN;
    return *p & 0x80 ? -v : v;
  }
};
typedef Fp8<4, 3, false> E4m3;
typedef Fp8<5, 2, true> E5m2;

// A's fragment with its metadata, as both mma.sp and wgmma.sp (per warp) have it: PTX ISA, "Matrix Fragments for
// sparse mma" m16n8k32 (16-bit) and m16n8k64 (8-bit elements).
template <class E, int selector>
static void decode_a(Thread* lane, typename E::sum (*a)[64 / E::size]) {
  constexpr int kept = 32 / E::size, k_all = 2 * kept;
  typename E::sum compressed[16][kept];
  uint8_t nibbles[16][k_all / 4];
  for (int l = 0; l < 32; l++) {
    int g = l / 4, t = l % 4;
    auto& in = *(const Mma*)lane[l].in;
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 4 / E::size; i++)
        compressed[g + 8 * (r % 2)][(4 * t + 16 * (r / 2)) / E::size + i] =
            E::value((const uint8_t*)&in.a[r] + i * E::size);
    for (int q = 0; q < 8; q++) {
      uint8_t nibble = in.e >> (4 * q) & 15;
      if (E::size == 2) {
        if (t / 2 == selector) nibbles[g + 8 * (q / 4)][4 * (t % 2) + q % 4] = nibble;
      } else {
        nibbles[g + 8 * (t % 2)][8 * (t / 2) + q] = nibble;
      }
    }
  }
  for (int row = 0; row < 16; row++)
    for (int group = 0; group < k_all / 4; group++) {
      for (int i = 0; i < 4; i++) a[row][4 * group + i] = 0;
      int first = nibbles[row][group] & 3, second = nibbles[row][group] >> 2;
      if (first >= second) error("metadata", "indices %d, %d in row %d, group %d", first, second, row, group);
      a[row][4 * group + first] = compressed[row][2 * group];
      a[row][4 * group + second] = compressed[row][2 * group + 1];
    }
}

// mma.sp m16n8k32 (16-bit) and m16n8k64 (8-bit elements): PTX ISA, "Matrix Fragments for sparse mma".
template <class E, int selector>
static void run_mma_sp(int warp) {
  constexpr int k_all = 64 / E::size;
  typedef typename E::sum Sum;
  Thread* lane = lanes(warp);
  counts["mma.sp"]++;
  Sum a[16][k_all], b[k_all][8];
  decode_a<E, selector>(lane, a);
  for (int l = 0; l < 32; l++)
    for (int r = 0; r < 4; r++)
      for (int i = 0; i < 4 / E::size; i++)
        b[(4 * (l % 4) + 16 * r) / E::size + i][l / 4] =
            E::value((const uint8_t*)&((const Mma*)lane[l].in)->b[r] + i * E::size);
  for (int l = 0; l < 32; l++)
    for (int q = 0; q < 4; q++) {
      int row = l / 4 + 8 * (q / 2), column = 2 * (l % 4) + q % 2;
      Sum sum;
      memcpy(&sum, &((const Mma*)lane[l].in)->c[q], 4);
      for (int k = 0; k < k_all; k++) sum += a[row][k] * b[k][column];
      memcpy((uint32_t*)lane[l].out + q, &sum, 4);
    }
}

void mma(Element element, int selector, const Mma& in, uint32_t* out) {
  static void (*const table[5][2])(int) = {
      {run_mma_sp<Fp16, 0>, run_mma_sp<Fp16, 1>}, {run_mma_sp<Bf16, 0>, run_mma_sp<Bf16, 1>},
      {run_mma_sp<S8, 0>, run_mma_sp<S8, 0>},     {run_mma_sp<E4m3, 0>, run_mma_sp<E4m3, 0>},
      {run_mma_sp<E5m2, 0>, run_mma_sp<E5m2, 0>},
  };
  collective("mma.sp", table[int(element)][selector], &in, out);
}

// wgmma.mma_async.sp m64nNk32 and m64nNk64, A in registers, B [n][k] in shared memory with the 128-byte swizzle.
// The product is made when the instruction is issued, and seen when it has been waited for; meanwhile nobody may
// write what it reads.
struct WgmmaIn {
  Mma mma;
  uint64_t descriptor;
  int n;
};

template <class E, int selector>
static void run_wgmma_sp(int warp) {
  constexpr int k_all = 64 / E::size;
  typedef typename E::sum Sum;
  Thread* lane = lanes(warp);
  counts["wgmma.sp"]++;
  auto& in = *(const WgmmaIn*)lane[0].in;
  for (int l = 0; l < 128; l++)
    if (((const WgmmaIn*)lane[l].in)->descriptor != in.descriptor)
      return error("divergence", "descriptors of a warpgroup differ");
  uint32_t start = uint32_t(in.descriptor & 0x3fff) << 4, stride = uint32_t(in.descriptor >> 32 & 0x3fff) << 4;
  if (in.descriptor >> 62 != 1) return error("misaligned", "a descriptor without the 128-byte swizzle");
  std::vector<Sum> b(k_all * in.n);
  std::vector<uint32_t> read;
  for (int column = 0; column < in.n; column++)
    for (int byte = 0; byte < 64; byte += 4) {
      uint32_t address = start + column / 8 * stride + column % 8 * 128 + byte;
      address ^= (address >> 7 & 7) << 4;
      self = warp * 32;
      if (!shared_inside("wgmma", address, 4)) return;
      Word& word = words[address / 4];
      if (word.in_flight) error("in-flight", "wgmma of shared+%u", address);
      else if (!word.initialised) error("uninitialised", "wgmma of shared+%u", address);
      else if (word.write_epoch == epoch) error("race", "wgmma of shared+%u, written since the barrier", address);
      else if (word.write_time > threads[word.writer].proxy_time)
        error("proxy", "wgmma of shared+%u, written without a proxy fence", address);
      read.push_back(address / 4);
      for (int i = 0; i < 4 / E::size; i++)
        b[((byte / E::size) + i) * in.n + column] = E::value(&shared[address + i * E::size]);
    }
  for (uint32_t w : read) words[w].multiplied++;
  for (int w = 0; w < 4; w++) {
    Sum a[16][k_all];
    decode_a<E, selector>(lane + 32 * w, a);
    for (int l = 0; l < 32; l++) {
      Thread& thread = lane[32 * w + l];
      if (!thread.fenced) error("fence", "wgmma of warp %d", warp + w);
      auto sums = (uint32_t*)thread.out;
      Product product{sums, std::vector<uint32_t>(sums, sums + in.n / 2), {}};
      auto before = [&](std::vector<Product>& group) {
        for (auto& other : group)
          if (other.sums == sums) product.result = other.result;
      };
      for (auto& group : thread.product_groups) before(group);
      before(thread.products);
      if (w == 0 && l == 0) product.words = read;
      for (int i = 0; i < in.n / 2; i++) {
        int row = l / 4 + 8 * (i % 4 / 2), column = 8 * (i / 4) + 2 * (l % 4) + i % 2;
        Sum sum;
        memcpy(&sum, &product.result[i], 4);
        for (int k = 0; k < k_all; k++) sum += a[row][k] * b[k * in.n + column];
        memcpy(&product.result[i], &sum, 4);
        sums[i] = 0xfefefefe;
      }
      thread.products.push_back(std::move(product));
    }
  }
}

void wgmma(Element element, int n, int selector, const Mma& in, uint64_t descriptor, uint32_t* sums) {
  static void (*const table[5][2])(int) = {
      {run_wgmma_sp<Fp16, 0>, run_wgmma_sp<Fp16, 1>}, {run_wgmma_sp<Bf16, 0>, run_wgmma_sp<Bf16, 1>},
      {run_wgmma_sp<S8, 0>, run_wgmma_sp<S8, 0>},     {run_wgmma_sp<E4m3, 0>, run_wgmma_sp<E4m3, 0>},
      {run_wgmma_sp<E5m2, 0>, run_wgmma_sp<E5m2, 0>},
  };
  WgmmaIn all{in, descriptor, n};
  collective("wgmma", table[int(element)][selector], &all, sums);
}

void wgmma_fence() { current->fenced = true; }

void proxy_fence() { current->proxy_time = current->clock++; }

void wgmma_commit() {
  current->product_groups.push_back(std::move(current->products));
  current->products.clear();
  current->fenced = false;
}

void wgmma_wait(int pending) {
  auto& groups = current->product_groups;
  while (int(groups.size()) > pending) {
    for (auto& product : groups.front()) {
      for (uint32_t w : product.words) words[w].multiplied--;
      bool last = true;  // of the products in flight with these sums
      for (size_t i = 1; i < groups.size(); i++)
        for (auto& other : groups[i]) last &= other.sums != product.sums;
      if (last) memcpy(product.sums, product.result.data(), 4 * product.result.size());
    }
    groups.erase(groups.begin());
  }
}

static void run_shfl(int warp) {
  for (int l = 0; l < 32; l++) *(int*)lanes(warp)[l].out = *(const int*)lanes(warp)[lanes(warp)[l].address % 32].in;
}

int shfl(int value, int source) {
  int out;
  collective("shfl", run_shfl, &value, &out, source);
  return out;
}

// Launch ----------------------------------------------------------------------------------------------------

static void (*kernel)();

static void fiber() {
  kernel();
  current->at = At::done;
  swapcontext(&current->context, &scheduler);
}

static void resume(int index) {
  self = index;
  current = &threads[index];
  current->at = At::running;
  swapcontext(&scheduler, &current->context);
}

static bool at_wgmma(const Thread& thread) {
  return thread.at == At::collective && !strcmp(thread.collective.name, "wgmma");
}

static bool run_warpgroup(int warp) {  // a warpgroup all of whose lanes are at wgmma
  Thread* lane = lanes(warp);
  for (int l = 0; l < 128; l++)
    if (!at_wgmma(lane[l]) || lane[l].collective.run != lane[0].collective.run) return false;
  lane[0].collective.run(warp);
  for (int l = 0; l < 128; l++) resume(warp * 32 + l);
  return true;
}

static bool run_warp(int warp) {  // until all its lanes wait for a barrier or are done; false: it did nothing
  bool moved = false;
  for (;;) {
    Thread* lane = lanes(warp);
    int waiting = 0;
    for (int l = 0; l < 32; l++) waiting += lane[l].at == At::collective;
    if (!waiting || (waiting == 32 && at_wgmma(lane[0]))) return moved;
    for (int l = 1; l < 32; l++)
      if (waiting != 32 || lane[l].collective.run != lane[0].collective.run) {
        self = warp * 32 + l;
        error("divergence", "lanes of warp %d are not at one instruction", warp);
        throw Stop("divergence");
      }
    lane[0].collective.run(warp);
    for (int l = 0; l < 32; l++) resume(warp * 32 + l);
    moved = true;
  }
}

static void run_block() {
  epoch = 0;
  memset(shared.data(), 0xff, shared.size());
  words.assign(shared.size() / 4, Word());
  bank_log.clear();
  for (int i = 0; i < block_threads; i++) {
    Thread& thread = threads[i];
    thread.index = {unsigned(i), 0, 0};
    thread.open.clear();
    thread.groups.clear();
    thread.accesses.clear();
    thread.products.clear();
    thread.product_groups.clear();
    thread.fenced = false;
    thread.clock = 1;
    thread.proxy_time = 0;
    thread.stack.resize(256 << 10);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, fiber, 0);
  }
  for (int i = 0; i < block_threads; i++) resume(i);
  for (;;) {
    for (int warp = 0; warp < block_threads / 32; warp++) run_warp(warp);
    bool multiplied = false;
    for (int warp = 0; warp + 3 < block_threads / 32; warp += 4) multiplied |= run_warpgroup(warp);
    if (multiplied) continue;
    for (auto& thread : threads)
      if (thread.at == At::collective) {
        error("divergence", "a warpgroup is not at one wgmma");
        throw Stop("divergence");
      }
    int done = 0;
    for (auto& thread : threads) done += thread.at == At::done;
    check_banks();
    for (auto& thread : threads) thread.accesses.clear();
    if (done == block_threads) break;
    if (done) {
      error("divergence", "%d of %d threads have ended while others wait at a barrier", done, block_threads);
      throw Stop("divergence");
    }
    epoch++;
    for (int i = 0; i < block_threads; i++) resume(i);
  }
  for (auto& thread : threads) {
    size_t left = thread.open.size();
    for (auto& group : thread.groups) left += group.size();
    left += thread.products.size() + thread.product_groups.size();
    if (left) error("left-over", "%zu copies or products in flight at the end", left);
  }
}

int launch(void (*body)(), const Run& run) {
  kernel = body;
  grid = run.grid;
  block_threads = run.threads;
  tensors.clear();
  for (int i = 0; i < run.tensors; i++)
    tensors.push_back({(uint8_t*)run.data[i], run.sizes[i], bool(run.writable[i]),
                       std::vector<uint8_t>(run.writable[i] ? run.sizes[i] : 0)});
  shared.assign(run.shared_bytes, 0);
  threads.clear();
  threads.resize(run.threads);
  errors.clear();
  counts.clear();
  first_errors.clear();
  try {
    for (block.z = 0; block.z < grid.z; block.z++)
      for (block.y = 0; block.y < grid.y; block.y++)
        for (block.x = 0; block.x < grid.x; block.x++) run_block();
  } catch (const Stop&) {
  }
  std::string text;
  for (auto& [kind, number] : errors) text += "error " + kind + " " + std::to_string(number) + "\n";
  for (auto& [kind, number] : counts) text += "count " + kind + " " + std::to_string(number) + "\n";
  text += first_errors;
  snprintf(run.report, run.room, "%s", text.c_str());
  return int(errors.size());
}

}  // namespace sim

