// The next token, for CPUs. Called through ctypes by fast_decode.py, which owns all memory.
//
// anew_decode: of one text, the whole of GPT-2 in one call, since that is bound by reading the weights once. Matrices are stored (out, in),
// as bf16 or in 8 bits (value + 128) with a scale for every GROUP values; activations and sums are fp32. All threads stay in one parallel region for the
// whole step and meet five times a layer.
// anew_attend, anew_norm: of several texts, what lies between the matrix products, which are oneDNN's there.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace {

constexpr int GROUP = 32, LANES = 64;

struct Matrix {
    const void *values;   // (out, in)
    const float *scales;  // (out, in / GROUP) for 8 bits, else null
    const float *bias;    // (out), or null
};

struct Layer {
    const float *ln_1_weight, *ln_1_bias;
    Matrix attention, projection;
    const float *ln_2_weight, *ln_2_bias;
    Matrix wide, narrow;
};

struct Model {
    int64_t layers, heads, width, capacity, vocabulary;
    float epsilon;
    const Layer *layer;
    const float *wte, *wpe, *ln_f_weight, *ln_f_bias;  // wte here is the table that ids are looked up in
    Matrix head;
};

inline float to_float(uint16_t bf16) {
    uint32_t bits = uint32_t(bf16) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint16_t to_bf16(float value) {  // round to nearest even; what is not a number stays one
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16) | 64;
    return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Of `n` values, a power of two, which are used up: by halves, since one after the other is as slow as adding is late.
inline float total_of(float *values, int64_t n) {
    for (int64_t half = n / 2; half > 0; half /= 2)
        for (int64_t j = 0; j < half; j++) values[j] += values[j + half];
    return values[0];
}

// Of a row in bf16 and a vector.
inline float dot(const uint16_t *a, const float *b, int64_t n) {
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; j++) sums[j] += to_float(a[i + j]) * b[i + j];
    float total = total_of(sums, LANES);
    for (; i < n; i++) total += to_float(a[i]) * b[i];
    return total;
}

void layer_norm(const float *x, const float *weight, const float *bias, float epsilon, int64_t n, float *out) {
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += x[i];
    const float mean = float(sum / n);
    for (int64_t i = 0; i < n; i++) squares += double(x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / std::sqrt(float(squares / n) + epsilon);
    for (int64_t i = 0; i < n; i++) out[i] = (x[i] - mean) * scale * weight[i] + bias[i];
}

inline float gelu(float x) { return 0.5f * x * (1.0f + std::tanh(0.7978845608f * (x + 0.044715f * x * x * x))); }

// A vector as the products with int8 matrices want it: in 8 bits too, with a scale for every GROUP values, where the CPU multiplies bytes.
struct Bytes {
    std::vector<int8_t> values;
    std::vector<float> scales;
    std::vector<int32_t> start;  // -128 times the sum of 4 values: what weights + 128, which are unsigned, add too much

    void take(const float *x, int64_t n) {
        values.resize(n), scales.resize((n + GROUP - 1) / GROUP), start.assign(n / 4, 0);
        for (int64_t g = 0; g < n / GROUP; g++, x += GROUP) {
            float most = 0;
            for (int64_t j = 0; j < GROUP; j++) most = std::max(most, std::fabs(x[j]));
            const float scale = most / 127, inverse = most > 0 ? 127 / most : 0.0f;
            scales[g] = scale;
            for (int64_t j = 0; j < GROUP; j++) {
                values[g * GROUP + j] = int8_t(std::lrint(x[j] * inverse));
                start[(g * GROUP + j) / 4] -= 128 * values[g * GROUP + j];
            }
        }
    }
};

#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
inline __m128 two(const float *values) { return _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(values))); }

// Of a row in int8, stored as value + 128, and a vector: 64 products an instruction, two groups at a time.
inline float dot(const uint8_t *a, const float *scale, const Bytes &b, const float *, int64_t n) {
    __m512 sums = _mm512_setzero_ps();
    const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    int64_t i = 0;
    for (; i + 2 * GROUP <= n; i += 2 * GROUP) {
        const __m512i start = _mm512_loadu_si512(b.start.data() + i / 4);
        const __m512i total = _mm512_dpbusd_epi32(start, _mm512_loadu_si512(a + i), _mm512_loadu_si512(b.values.data() + i));
        const __m128 both = _mm_mul_ps(two(scale + i / GROUP), two(b.scales.data() + i / GROUP));
        sums = _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(both)), sums);
    }
    float total = _mm512_reduce_add_ps(sums);
    if (i < n) {  // an odd group at the end
        const __m256i *start = reinterpret_cast<const __m256i *>(b.start.data() + i / 4), *x = reinterpret_cast<const __m256i *>(b.values.data() + i);
        const __m256i rest = _mm256_dpbusd_epi32(_mm256_loadu_si256(start), _mm256_loadu_si256(reinterpret_cast<const __m256i *>(a + i)),
                                                 _mm256_loadu_si256(x));
        total += _mm512_reduce_add_epi32(_mm512_inserti64x4(_mm512_setzero_si512(), rest, 0)) * scale[i / GROUP] * b.scales[i / GROUP];
    }
    return total;
}
#else
// Of a row in int8, stored as value + 128, and a vector in fp32.
inline float dot(const uint8_t *a, const float *scale, const Bytes &, const float *b, int64_t n) {
    float sums[GROUP] = {};
    for (int64_t g = 0; g < n / GROUP; g++, a += GROUP, b += GROUP)
        for (int64_t j = 0; j < GROUP; j++) sums[j] += scale[g] * float(int32_t(a[j]) - 128) * b[j];
    return total_of(sums, GROUP);
}
#endif

// For every output n: give(n, row n . x + bias). The loop is shared out among the threads of the region, which wait at its end.
template <class Give>
void multiply(const Matrix &m, const float *x, Bytes &bytes, int64_t in, int64_t out, Give give) {
    if (m.scales) bytes.take(x, in);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < out; n++) {
        const float sum = m.scales ? dot(static_cast<const uint8_t *>(m.values) + n * in, m.scales + n * (in / GROUP), bytes, x, in)
                                   : dot(static_cast<const uint16_t *>(m.values) + n * in, x, in);
        give(n, sum + (m.bias ? m.bias[n] : 0.0f));
    }
}

// One head: the new key and value go into the cache, and the query attends to all that is there. q, k, v and out have `size` values.
void attend(const float *q, const float *k, const float *v, int64_t size, uint16_t *keys, uint16_t *values, int64_t position, float *scores,
            float *out) {
    for (int64_t i = 0; i < size; i++) {
        keys[position * size + i] = to_bf16(k[i]);
        values[position * size + i] = to_bf16(v[i]);
    }
    const float scale = 1.0f / std::sqrt(float(size));
    float most = -INFINITY, total = 0;
    for (int64_t t = 0; t <= position; t++) {
        scores[t] = dot(keys + t * size, q, size) * scale;
        most = std::max(most, scores[t]);
    }
    for (int64_t t = 0; t <= position; t++) total += scores[t] = std::exp(scores[t] - most);
    std::fill(out, out + size, 0.0f);
    for (int64_t t = 0; t <= position; t++) {
        const float share = scores[t] / total;
        for (int64_t i = 0; i < size; i++) out[i] += share * to_float(values[t * size + i]);
    }
}

}  // namespace

// keys, values: bf16 (layers, heads, capacity, size), of which `position` tokens are there; logits: fp32 (vocabulary); scratch: 9 widths.
extern "C" void anew_decode(
    const Model *model, int64_t id, int64_t position, uint16_t *keys, uint16_t *values, float *scratch, float *logits, int threads) {
    const Model &m = *model;
    const int64_t C = m.width, size = C / m.heads;
    float *x = scratch, *qkv = x + C, *mixed = qkv + 3 * C, *wide = mixed + C;  // C, 3 C, C, 4 C
    for (int64_t i = 0; i < C; i++) x[i] = m.wte[id * C + i] + m.wpe[position * C + i];
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> own(C), scores(m.capacity);  // each thread normalises for itself: that saves a meeting
        Bytes bytes;
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer &layer = m.layer[l];
            layer_norm(x, layer.ln_1_weight, layer.ln_1_bias, m.epsilon, C, own.data());
            multiply(layer.attention, own.data(), bytes, C, 3 * C, [&](int64_t n, float y) { qkv[n] = y; });
#pragma omp for schedule(static)
            for (int64_t head = 0; head < m.heads; head++) {
                const int64_t place = (l * m.heads + head) * m.capacity * size;
                const float *q = qkv + head * size;
                attend(q, q + C, q + 2 * C, size, keys + place, values + place, position, scores.data(), mixed + head * size);
            }
            multiply(layer.projection, mixed, bytes, C, C, [&](int64_t n, float y) { x[n] += y; });
            layer_norm(x, layer.ln_2_weight, layer.ln_2_bias, m.epsilon, C, own.data());
            multiply(layer.wide, own.data(), bytes, C, 4 * C, [&](int64_t n, float y) { wide[n] = gelu(y); });
            multiply(layer.narrow, wide, bytes, 4 * C, C, [&](int64_t n, float y) { x[n] += y; });
        }
        layer_norm(x, m.ln_f_weight, m.ln_f_bias, m.epsilon, C, own.data());
        multiply(m.head, own.data(), bytes, C, m.vocabulary, [&](int64_t n, float y) { logits[n] = y; });
    }
}

// One layer's attention of a new token in each of `rows` texts, which stand at positions[row].
// qkv, out: bf16 (rows, 3 widths) and (rows, width); keys, values: bf16 (rows, heads, capacity, size).
extern "C" void anew_attend(const uint16_t *qkv, uint16_t *keys, uint16_t *values, const int64_t *positions, uint16_t *out, int64_t rows,
                            int64_t heads, int64_t size, int64_t capacity, int threads) {
    const int64_t C = heads * size;
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scores(capacity), own(4 * size);  // q, k, v and what comes out
#pragma omp for schedule(static)
        for (int64_t i = 0; i < rows * heads; i++) {
            const int64_t row = i / heads, head = i % heads;
            for (int64_t part = 0; part < 3; part++)
                for (int64_t j = 0; j < size; j++) own[part * size + j] = to_float(qkv[(3 * row + part) * C + head * size + j]);
            const float *q = own.data();
            float *mixed = own.data() + 3 * size;
            const int64_t place = i * capacity * size;
            attend(q, q + size, q + 2 * size, size, keys + place, values + place, positions[row], scores.data(), mixed);
            for (int64_t j = 0; j < size; j++) out[row * C + head * size + j] = to_bf16(mixed[j]);
        }
    }
}

// x += added, where there is one, and out = layer_norm(x) * weight + bias. x: fp32, added and out: bf16, all (rows, width).
extern "C" void anew_norm(float *x, const uint16_t *added, const float *weight, const float *bias, float epsilon, uint16_t *out, int64_t rows,
                          int64_t width, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> own(width);
#pragma omp for schedule(static)
        for (int64_t row = 0; row < rows; row++) {
            float *here = x + row * width;
            if (added)
                for (int64_t i = 0; i < width; i++) here[i] += to_float(added[row * width + i]);
            layer_norm(here, weight, bias, epsilon, width, own.data());
            for (int64_t i = 0; i < width; i++) out[row * width + i] = to_bf16(own[i]);
        }
    }
}
