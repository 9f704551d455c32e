// y = x W^T + bias on a GPU, for few rows of x: W lies in 4- or 8-bit codes and is read once, as it lies.
//
// Layout and formula are those of kernels/quantization.py; of MXFP4, of core/microscaling.py. Values are not rounded
// before they are multiplied, sums are float32 and rounded once, at the end, as in linear.cpp.
//
// kernels/fused_product.py appends one line that names a variant and has the text compiled when it is first needed. No
// header is included, so that NVRTC alone can do it; nvcc takes the text, too, and so does a host's C++ compiler behind
// tests/support/cuda_on_host.h, which defines what CUDA's language adds.

typedef unsigned char Byte;
typedef unsigned short Short;
typedef unsigned int Word;

// x (count, inputs), rows x_row values apart; codes (outputs, row_bytes); numbers: of each row and group two float16,
// its scale and its smallest value, or of MXFP4 one byte; bias (outputs), null: none; y (count, outputs), without gaps.
struct Product {
    const Byte* codes;
    const void* numbers;
    const void* x;
    const void* bias;
    void* y;
    long long x_row;
    int count, outputs, inputs, row_bytes, groups;
};

#ifndef CUDA_ON_HOST
// cuda_fp16.h has these, but not everybody who has NVRTC has its headers.
__device__ inline float wide_half(Short bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

__device__ inline Short narrow_half(float value) {
    Short bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}
#endif

struct Half {
    typedef Short Stored;
    static __device__ inline float wide(Short bits) { return wide_half(bits); }
    static __device__ inline Short narrow(float value) { return narrow_half(value); }
};

struct Brain {  // bfloat16, which devices before compute capability 8.0 have no instructions for
    typedef Short Stored;
    static __device__ inline float wide(Short bits) { return __uint_as_float((Word)bits << 16); }
    static __device__ inline Short narrow(float value) {
        const Word bits = __float_as_uint(value);
        if ((bits & 0x7FFFFFFF) > 0x7F800000) return 0x7FC0;  // NaN: rounding could make it an infinity
        return (Short)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
    }
};

struct Single {
    typedef float Stored;
    static __device__ inline float wide(float value) { return value; }
    static __device__ inline float narrow(float value) { return value; }
};

// So many neighbours, read at once where their address is a multiple of their size (of 16 bytes, if they have more).
template <class Stored, int COUNT>
struct alignas(sizeof(Stored) * COUNT < 16 ? sizeof(Stored) * COUNT : 16) Some {
    Stored at[COUNT];
};

// The number in the j-th byte of a word. Behind the exponent of 2^23 a float32 holds whole numbers as they are: adding
// and taking away is done at full rate, converting at a quarter of it or less.
__device__ inline float byte_of(Word word, int j) {
    return __uint_as_float(__byte_perm(word, 0x4B000000, 0x7440 | j)) - 8388608.0f;
}

// E2M1 in the j-th byte, a half of which is 0. Exponent and mantissa as a float32 has them, but for the bias: the
// smallest ones are denormal on both sides, so one exact product does for all.
__device__ inline float e2m1_of(Word word, int j) {
    const Word code = word >> (8 * j);
    return __uint_as_float((code & 7) << 22 | (code & 8) << 28) * 0x1p126f;
}

__device__ inline float power_of(Byte exponent) {
    return __uint_as_float(exponent ? (Word)exponent << 23 : 0x400000);
}

// The values x[at .. at + COUNT) of a row. WHOLE: all are there and lie together; else those beyond the row are 0.
template <class Type, int COUNT, bool WHOLE>
__device__ inline void read(const typename Type::Stored* x, int at, int inputs, float* into) {
    if (WHOLE) {
        const Some<typename Type::Stored, COUNT> some = *(const Some<typename Type::Stored, COUNT>*)(x + at);
#pragma unroll
        for (int j = 0; j < COUNT; ++j) into[j] = Type::wide(some.at[j]);
    } else {
#pragma unroll
        for (int j = 0; j < COUNT; ++j) into[j] = at + j < inputs ? Type::wide(x[at + j]) : 0.0f;
    }
}

// A warp makes OUTPUTS columns of y. Its lanes read neighbouring pieces of EACH bytes of each of their rows of codes,
// all of which lie in one group; 4-bit ones hold values of the group's lower half and as many of its upper one. What a
// lane has of x serves all OUTPUTS, which is why there are several.
// WHOLE: pieces may be read at once, and no value is missing (fused_product.py: is_whole). ROWS: at least count.
template <class Type, int BITS, int GROUP, bool MICRO, bool WHOLE, int ROWS>
__device__ inline void multiply(const Product& p) {
    typedef typename Type::Stored Stored;
    constexpr int OUTPUTS = ROWS > 8 ? 2 : 4;
    constexpr int EACH = WHOLE ? 8 : 4;
    constexpr int PARTS = 8 / BITS;  // values of a byte: these many pieces of x belong to a piece of codes
    constexpr int GROUP_BYTES = GROUP * BITS / 8;
    const int lane = threadIdx.x % 32;
    const int first = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * OUTPUTS;
    if (first >= p.outputs) return;  // the whole warp
    float sums[OUTPUTS][ROWS];
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sums[o][r] = 0.0f;
    }
    for (int place = lane * EACH; place < p.row_bytes; place += 32 * EACH) {
        const int group = place / GROUP_BYTES;
        int at = place, upper = 0;
        if (BITS == 4) {
            const int room = min(GROUP, (p.inputs - group * GROUP + 7) / 8 * 8);
            at = group * GROUP + place % GROUP_BYTES;
            upper = room / 2;
        }
        float weights[OUTPUTS][PARTS][EACH];
#pragma unroll
        for (int o = 0; o < OUTPUTS; ++o) {
            const long long row = min(first + o, p.outputs - 1);
            const Some<Word, EACH / 4> codes = *(const Some<Word, EACH / 4>*)(p.codes + row * p.row_bytes + place);
            float scale, smallest = 0.0f;
            if (MICRO) {
                scale = power_of(((const Byte*)p.numbers)[row * p.groups + group]);
            } else {
                const Some<Short, 2> both = ((const Some<Short, 2>*)p.numbers)[row * p.groups + group];
                scale = wide_half(both.at[0]);
                smallest = wide_half(both.at[1]);
            }
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
#pragma unroll
                for (int j = 0; j < EACH; ++j) {
                    Word word = codes.at[j / 4];
                    if (BITS == 4) word = word >> (4 * part) & 0x0F0F0F0F;
                    const float code = MICRO ? e2m1_of(word, j % 4) : byte_of(word, j % 4);
                    weights[o][part][j] = MICRO ? code * scale : fmaf(code, scale, smallest);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            const Stored* x = (const Stored*)p.x + min(r, p.count - 1) * p.x_row;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                float values[EACH];
                read<Type, EACH, WHOLE>(x, at + part * upper, p.inputs, values);
#pragma unroll
                for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
                    for (int j = 0; j < EACH; ++j) sums[o][r] = fmaf(weights[o][part][j], values[j], sums[o][r]);
                }
            }
        }
    }
#pragma unroll
    for (int o = 0; o < OUTPUTS; ++o) {
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
            float sum = sums[o][r];
#pragma unroll
            for (int apart = 16; apart > 0; apart /= 2) sum += __shfl_xor_sync(0xFFFFFFFF, sum, apart);
            if (lane == o * ROWS + r && r < p.count && first + o < p.outputs) {  // each lane writes one
                if (p.bias) sum += Type::wide(((const Stored*)p.bias)[first + o]);
                ((Stored*)p.y)[(long long)r * p.outputs + first + o] = Type::narrow(sum);
            }
        }
    }
}
