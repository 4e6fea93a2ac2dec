// Decode one more token on a CPU. cpu_decoder.py calls these functions through ctypes and owns all
// memory.
//
// anew_decode: the whole of GPT-2 for one text, in one call. Its time is that of reading the
// weights once. Keys and values are bf16 or fp32; activations and sums are fp32. All threads stay
// in one parallel region for the whole step and synchronise five times a layer.
//
// anew_attend, anew_norm: for several texts, what lies between the matrix products, which are
// oneDNN's. All tensors are bf16, or all are fp32.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 32;  // values that share a scale
constexpr int LANES = 64;  // partial sums of a dot product, which the compiler keeps in vectors
constexpr int64_t COLUMNS = 2048;  // of a matrix that is read by columns, at most at a time

enum Storage : int64_t {
    BF16,          // (out, in)
    INT8,          // (out, in) of value + 128, with a scale for every GROUP values
    FP32,          // (out, in)
    FP32_COLUMNS,  // (in, out), as GPT-2 stores the matrices of its blocks
};

struct Matrix {
    Storage storage;
    const void *values;
    const float *scales;  // (out, in / GROUP) for INT8, else null
    const float *bias;    // (out), or null
};

struct Norm {
    const float *weight, *bias;
};

struct Layer {
    Norm ln_1;
    Matrix c_attn, attn_c_proj;
    Norm ln_2;
    Matrix c_fc, mlp_c_proj;
};

struct Model {
    int64_t layers, heads, width, vocabulary;
    float epsilon;
    const Layer *layer;
    const float *wte, *wpe;  // ids and positions are looked up in fp32
    Norm ln_f;
    Matrix head;  // wte again, for the logits
};

inline float to_float(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float to_float(float value) { return value; }

// Store a value as bf16, rounded to nearest even (NaN stays NaN), or as it is.
inline void store(uint16_t &bf16, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const bool is_nan = (bits & 0x7fffffff) > 0x7f800000;
    bf16 = is_nan ? uint16_t(bits >> 16) | 64 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(float &fp32, float value) { fp32 = value; }

// Sum n values, where n is a power of two, and overwrite them. Adding one half to the other lets
// the CPU add many values at a time; adding one value after the other waits for each sum.
inline float sum_of(float *values, int64_t n) {
    for (int64_t half = n / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; j++) values[j] += values[j + half];
    return values[0];
}

// Dot product of a row in bf16 or fp32 and a vector in fp32.
template <class Value>
inline float dot(const Value *a, const float *b, int64_t n) {
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; j++) sums[j] += to_float(a[i + j]) * b[i + j];
    float total = sum_of(sums, LANES);
    for (; i < n; i++) total += to_float(a[i]) * b[i];
    return total;
}

void layer_norm(const float *x, const Norm &norm, float epsilon, int64_t n, float *out) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    const float mean = float(sum / n);
    for (int64_t i = 0; i < n; i++) squares += double(x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(float(squares / n) + epsilon);
    for (int64_t i = 0; i < n; i++)
        out[i] = (x[i] - mean) * scale * norm.weight[i] + norm.bias[i];
}

inline float gelu(float x) {
    return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define HAS_VNNI
#elif defined(__AVX2__) && defined(__FMA__)
#define HAS_AVX2
#endif

// A vector in 8 bits with a scale for every GROUP values, for products with int8 matrices. The dot
// product for CPUs without VNNI or AVX2 does not read it.
struct QuantizedVector {
    std::vector<int8_t> values;
    std::vector<float> scales;
#ifdef HAS_VNNI
    // -128 times the sum of 4 values. The weights are stored as value + 128, since VNNI multiplies
    // unsigned by signed bytes; this takes the excess away.
    std::vector<int32_t> correction;
#endif

    void assign(const float *x, int64_t n) {
        values.resize(n);
        scales.resize((n + GROUP - 1) / GROUP);
        for (int64_t g = 0; g < n / GROUP; g++, x += GROUP) {
            float largest = 0, zero = 0;
            for (int64_t j = 0; j < GROUP; j++) {
                largest = std::max(largest, std::fabs(x[j]));
                zero += 0 * x[j];  // NaN if a value is NaN or infinite, which no byte can hold
            }
            const bool has_bytes = largest > 0 && zero == 0;
            const float inverse = has_bytes ? 127 / largest : 0.0f;
            scales[g] = largest / 127 + zero;
            for (int64_t j = 0; j < GROUP; j++)
                values[g * GROUP + j] = has_bytes ? int8_t(std::lrint(x[j] * inverse)) : 0;
        }
#ifdef HAS_VNNI
        correction.assign(n / 4, 0);
        for (int64_t i = 0; i < n; i++) correction[i / 4] -= 128 * values[i];
#endif
    }
};

#ifdef HAS_VNNI
inline __m128 load_two(const float *values) {
    return _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(values)));
}

// Dot product of a row in int8, stored as value + 128, and a vector: 64 products an instruction,
// which are two groups.
inline float dot(const uint8_t *a, const float *scale, const QuantizedVector &b, const float *,
                 int64_t n) {
    __m512 sums = _mm512_setzero_ps();
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    int64_t i = 0;
    for (; i + 2 * GROUP <= n; i += 2 * GROUP) {
        const __m512i start = _mm512_loadu_si512(b.correction.data() + i / 4);
        const __m512i weights = _mm512_loadu_si512(a + i);
        const __m512i bytes = _mm512_loadu_si512(b.values.data() + i);
        const __m512i total = _mm512_dpbusd_epi32(start, weights, bytes);
        const __m128 weight_scales = load_two(scale + i / GROUP);
        const __m128 both = _mm_mul_ps(weight_scales, load_two(b.scales.data() + i / GROUP));
        const __m512 scales = _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(both));
        sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), scales, sums);
    }
    float total = _mm512_reduce_add_ps(sums);
    if (i < n) {  // an odd group at the end
        const auto load = [](const void *bytes) {
            return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(bytes));
        };
        const __m256i start = load(b.correction.data() + i / 4);
        const __m256i rest = _mm256_dpbusd_epi32(start, load(a + i), load(b.values.data() + i));
        const __m512i widened = _mm512_inserti64x4(_mm512_setzero_si512(), rest, 0);
        total += _mm512_reduce_add_epi32(widened) * scale[i / GROUP] * b.scales[i / GROUP];
    }
    return total;
}
#elif defined(HAS_AVX2)
// Dot product of a row in int8, stored as value + 128, and a vector: a group at a time.
//
// `vpmaddubsw` multiplies unsigned by signed bytes and adds two products in 16 bits, which hold
// 2 x 127 x 127 but not 2 x 255 x 127. So 128 is taken off first, and the sign of each weight is
// moved to the other factor.
inline float dot(const uint8_t *a, const float *scale, const QuantizedVector &b, const float *,
                 int64_t n) {
    const __m256i sign_bit = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
    const auto load = [](const void *bytes) {
        return _mm256_loadu_si256(static_cast<const __m256i *>(bytes));
    };
    __m256 sums = _mm256_setzero_ps();
    for (int64_t g = 0; g < n / GROUP; g++) {
        const __m256i weights = _mm256_xor_si256(load(a + g * GROUP), sign_bit);
        const __m256i bytes = _mm256_sign_epi8(load(b.values.data() + g * GROUP), weights);
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), bytes);
        const __m256 total = _mm256_cvtepi32_ps(_mm256_madd_epi16(pairs, ones));
        sums = _mm256_fmadd_ps(total, _mm256_set1_ps(scale[g] * b.scales[g]), sums);
    }
    float lanes[8];
    _mm256_storeu_ps(lanes, sums);
    return sum_of(lanes, 8);
}
#else
// Dot product of a row in int8, stored as value + 128, and a vector in fp32.
inline float dot(const uint8_t *a, const float *scale, const QuantizedVector &, const float *b,
                 int64_t n) {
    float sums[GROUP] = {};
    for (int64_t g = 0; g < n / GROUP; g++, a += GROUP, b += GROUP)
        for (int64_t j = 0; j < GROUP; j++) sums[j] += scale[g] * float(int32_t(a[j]) - 128) * b[j];
    return sum_of(sums, GROUP);
}
#endif

// a / b, rounded up.
inline int64_t divided(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Dot products of x (in) and `width` neighbouring columns of a matrix whose rows are `stride` apart.
// Eight rows at a time, so that the sums are loaded and stored an eighth as often as the weights.
inline void dot_columns(const float *weights, int64_t stride, const float *x, int64_t in,
                        int64_t width, float *sums) {
    std::fill(sums, sums + width, 0.0f);
    int64_t i = 0;
    for (; i + 8 <= in; i += 8) {
        const float *a = weights + i * stride, *b = a + stride, *c = b + stride, *d = c + stride;
        const float *e = d + stride, *f = e + stride, *g = f + stride, *h = g + stride;
        for (int64_t j = 0; j < width; j++)
            sums[j] += ((x[i] * a[j] + x[i + 1] * b[j]) + (x[i + 2] * c[j] + x[i + 3] * d[j])) +
                       ((x[i + 4] * e[j] + x[i + 5] * f[j]) + (x[i + 6] * g[j] + x[i + 7] * h[j]));
    }
    for (; i < in; i++)
        for (int64_t j = 0; j < width; j++) sums[j] += x[i] * weights[i * stride + j];
}

// Call give(n, row n . x + bias) for every output n. The threads of the parallel region share the
// outputs and synchronise at the end. `quantized` is scratch memory of the thread.
template <class Give>
void multiply(const Matrix &m, const float *x, QuantizedVector &quantized, int64_t in, int64_t out,
              Give give) {
    const auto add_bias = [&](int64_t n, float sum) { give(n, sum + (m.bias ? m.bias[n] : 0.0f)); };
    if (m.storage == FP32_COLUMNS) {
        // Equally many columns for each thread, and as few pieces as possible: CPUs load the next
        // values of a piece ahead.
        const int64_t share = divided(out, omp_get_num_threads());
        const int64_t columns = 16 * divided(divided(share, divided(share, COLUMNS)), 16);
#pragma omp for schedule(static)
        for (int64_t start = 0; start < out; start += columns) {
            float sums[COLUMNS];
            const int64_t width = std::min(columns, out - start);
            dot_columns(static_cast<const float *>(m.values) + start, out, x, in, width, sums);
            for (int64_t j = 0; j < width; j++) add_bias(start + j, sums[j]);
        }
        return;
    }
    if (m.storage == INT8) quantized.assign(x, in);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < out; n++) {
        if (m.storage == INT8)
            add_bias(n, dot(static_cast<const uint8_t *>(m.values) + n * in,
                            m.scales + n * (in / GROUP), quantized, x, in));
        else if (m.storage == BF16)
            add_bias(n, dot(static_cast<const uint16_t *>(m.values) + n * in, x, in));
        else
            add_bias(n, dot(static_cast<const float *>(m.values) + n * in, x, in));
    }
}

// One head: store the new key and value at `position` of the cache, and let the query attend to all
// positions up to it. q, k, v and out have `size` values; `scores` is scratch memory.
template <class Value>
void attend(const float *q, const float *k, const float *v, int64_t size, Value *keys,
            Value *values, int64_t position, float *scores, float *out) {
    for (int64_t i = 0; i < size; i++) {
        store(keys[position * size + i], k[i]);
        store(values[position * size + i], v[i]);
    }
    const float scale = 1.0f / std::sqrt(float(size));
    float largest = -INFINITY, total = 0;
    for (int64_t t = 0; t <= position; t++) {
        scores[t] = dot(keys + t * size, q, size) * scale;
        largest = std::max(largest, scores[t]);
    }
    for (int64_t t = 0; t <= position; t++) total += scores[t] = std::exp(scores[t] - largest);
    std::fill(out, out + size, 0.0f);
    for (int64_t t = 0; t <= position; t++) {
        const float weight = scores[t] / total;
        for (int64_t i = 0; i < size; i++) out[i] += weight * to_float(values[t * size + i]);
    }
}

// anew_decode, with keys and values of the type `Value`.
template <class Value>
void decode(const Model &m, int64_t id, int64_t position, int64_t capacity, Value *keys,
            Value *values, float *scratch, float *logits, int threads) {
    const int64_t C = m.width, size = C / m.heads;
    float *x = scratch, *qkv = x + C, *mixed = qkv + 3 * C, *wide = mixed + C;  // C, 3 C, C, 4 C
    for (int64_t i = 0; i < C; i++) x[i] = m.wte[id * C + i] + m.wpe[position * C + i];
#pragma omp parallel num_threads(threads)
    {
        // Each thread normalises for itself, which saves a synchronisation.
        std::vector<float> normed(C), scores(capacity);
        QuantizedVector quantized;
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer &layer = m.layer[l];
            layer_norm(x, layer.ln_1, m.epsilon, C, normed.data());
            multiply(layer.c_attn, normed.data(), quantized, C, 3 * C,
                     [&](int64_t n, float y) { qkv[n] = y; });
#pragma omp for schedule(static)
            for (int64_t head = 0; head < m.heads; head++) {
                const int64_t start = (l * m.heads + head) * capacity * size;
                const float *q = qkv + head * size;
                attend(q, q + C, q + 2 * C, size, keys + start, values + start, position,
                       scores.data(), mixed + head * size);
            }
            multiply(layer.attn_c_proj, mixed, quantized, C, C,
                     [&](int64_t n, float y) { x[n] += y; });
            layer_norm(x, layer.ln_2, m.epsilon, C, normed.data());
            multiply(layer.c_fc, normed.data(), quantized, C, 4 * C,
                     [&](int64_t n, float y) { wide[n] = gelu(y); });
            multiply(layer.mlp_c_proj, wide, quantized, 4 * C, C,
                     [&](int64_t n, float y) { x[n] += y; });
        }
        layer_norm(x, m.ln_f, m.epsilon, C, normed.data());
        multiply(m.head, normed.data(), quantized, C, m.vocabulary,
                 [&](int64_t n, float y) { logits[n] = y; });
    }
}

// anew_attend, with tensors of the type `Value`.
template <class Value>
void attend_rows(const Value *qkv, Value *keys, Value *values, const int64_t *positions, Value *out,
                 int64_t rows, int64_t heads, int64_t size, int64_t capacity, int threads) {
    const int64_t C = heads * size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(capacity), vectors(4 * size);  // q, k, v and the result
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * heads; i++) {
            const int64_t row = i / heads, head = i % heads;
            for (int64_t part = 0; part < 3; part++) {
                const Value *source = qkv + (3 * row + part) * C + head * size;
                for (int64_t j = 0; j < size; j++) vectors[part * size + j] = to_float(source[j]);
            }
            const float *q = vectors.data();
            float *mixed = vectors.data() + 3 * size;
            const int64_t start = i * capacity * size;
            attend(q, q + size, q + 2 * size, size, keys + start, values + start, positions[row],
                   scores.data(), mixed);
            for (int64_t j = 0; j < size; j++) store(out[row * C + head * size + j], mixed[j]);
        }
    }
}

// anew_norm, with tensors of the type `Value`.
template <class Value>
void add_and_norm(float *x, const Value *added, const Norm &norm, float epsilon, Value *out,
                  int64_t rows, int64_t width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> normed(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            float *x_row = x + row * width;
            if (added)
                for (int64_t i = 0; i < width; i++) x_row[i] += to_float(added[row * width + i]);
            layer_norm(x_row, norm, epsilon, width, normed.data());
            for (int64_t i = 0; i < width; i++) store(out[row * width + i], normed[i]);
        }
    }
}

// Call `call` with a value of the type of the tensors.
template <class Call>
void call_with_type(bool fp32, Call call) {
    if (fp32)
        call(float());
    else
        call(uint16_t());
}

}  // namespace

// Read token `id` at `position` and write the logits of the next token.
// keys, values: (layers, heads, capacity, size), of which `position` tokens are filled; bf16, or
// fp32 if `fp32` is true. logits: fp32 (vocabulary). scratch: fp32 (9 width).
extern "C" void anew_decode(const Model *model, int64_t id, int64_t position, int64_t capacity,
                            void *keys, void *values, bool fp32, float *scratch, float *logits,
                            int threads) {
    call_with_type(fp32, [&](auto value) {
        using Value = decltype(value);
        decode(*model, id, position, capacity, static_cast<Value *>(keys),
               static_cast<Value *>(values), scratch, logits, threads);
    });
}

// One layer's attention of a new token in each of `rows` texts, at positions[row]. qkv, out:
// (rows, 3 width) and (rows, width). keys, values: (rows, heads, capacity, size).
extern "C" void anew_attend(const void *qkv, void *keys, void *values, const int64_t *positions,
                            void *out, bool fp32, int64_t rows, int64_t heads, int64_t size,
                            int64_t capacity, int threads) {
    call_with_type(fp32, [&](auto value) {
        using Value = decltype(value);
        attend_rows(static_cast<const Value *>(qkv), static_cast<Value *>(keys),
                    static_cast<Value *>(values), positions, static_cast<Value *>(out), rows, heads,
                    size, capacity, threads);
    });
}

// x += added, unless `added` is null; out = layer_norm(x) * weight + bias.
// x: always fp32; added, out: all (rows, width).
extern "C" void anew_norm(float *x, const void *added, const float *weight, const float *bias,
                          float epsilon, void *out, bool fp32, int64_t rows, int64_t width,
                          int threads) {
    call_with_type(fp32, [&](auto value) {
        using Value = decltype(value);
        add_and_norm(x, static_cast<const Value *>(added), {weight, bias}, epsilon,
                     static_cast<Value *>(out), rows, width, threads);
    });
}
