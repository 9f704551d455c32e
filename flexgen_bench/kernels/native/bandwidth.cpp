// How fast memory can be read: the rate that other kernels are compared with.

#include "threads.h"
#include "vectors.h"

namespace {

// Reads [data, data + bytes), a multiple of 4096, as ``streams`` sequential streams at once; what it returns only keeps the compiler
// from leaving it out. ``ahead``: bytes between what is read and what is prefetched, 0 leaves that to the hardware.
uint32_t read_part(const uint8_t* data, int64_t bytes, int64_t streams, int64_t ahead) {
  const int64_t part = bytes / streams / 256 * 256;
  Words total[4] = {};
  for (int64_t i = 0; i < part; i += 256)
    for (int64_t s = 0; s < streams; s++) {
      const uint8_t* at = data + s * part + i;
      for (int64_t line = 0; line < 256 && ahead; line += 64) __builtin_prefetch(at + ahead + line);
      for (int64_t j = 0; j < 256; j += 4 * sizeof(Words))
        for (int64_t k = 0; k < 4; k++) total[k] += load<Words>(at + j + k * static_cast<int64_t>(sizeof(Words)));
    }
  const Words all = total[0] + total[1] + total[2] + total[3];
  uint32_t found = 0;
  for (int i = 0; i < L; i++) found += all[i];
  return found;
}

}  // namespace

// The same on so many threads, each with a part of whole pages. data: a multiple of 4096 bytes.
extern "C" uint32_t read_bytes(const uint8_t* data, int64_t bytes, int64_t streams, int64_t ahead, int64_t threads) {
  const int64_t pages = bytes / 4096;
  Pieces parts(threads, 1);
  std::atomic<uint32_t> found{0};
  const auto work = [&] {
    parts.take([&](int64_t part, int64_t) {
      const int64_t begin = pages * part / threads, end = pages * (part + 1) / threads;
      found += read_part(data + begin * 4096, (end - begin) * 4096, streams, ahead);
    });
  };
  Crew::ours().run(threads, work);
  return found;
}
