// The next token of one text: the whole of GPT-2 in one call, for CPUs, where decoding is bound by reading the weights once.
//
// Matrices are stored (out, in), as bf16 or as int8 with a scale for every GROUP values; activations and sums are fp32. All threads stay in
// one parallel region for the whole step and meet five times a layer. Called through ctypes by fast_decode.py, which owns all memory.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int GROUP = 32, LANES = 64;

struct Matrix {
    const void *values;   // (out, in)
    const float *scales;  // (out, in / GROUP) for int8, else null
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

// Of a row in bf16 and a vector.
inline float dot(const uint16_t *a, const float *b, int64_t n) {
    float sums[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int64_t j = 0; j < LANES; j++) sums[j] += to_float(a[i + j]) * b[i + j];
    float total = 0;
    for (int64_t j = 0; j < LANES; j++) total += sums[j];
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

// The same for int8 with a scale for every GROUP values.
inline float dot(const int8_t *a, const float *scale, const float *b, int64_t n) {
    float sums[GROUP] = {};
    for (int64_t g = 0; g < n / GROUP; g++, a += GROUP, b += GROUP)
        for (int64_t j = 0; j < GROUP; j++) sums[j] += scale[g] * float(a[j]) * b[j];
    float total = 0;
    for (int64_t j = 0; j < GROUP; j++) total += sums[j];
    return total;
}

// For every output n: give(n, row n . x + bias). The loop is shared out among the threads of the region, which wait at its end.
template <class Give>
void multiply(const Matrix &m, const float *x, int64_t in, int64_t out, Give give) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < out; n++) {
        const float sum = m.scales ? dot(static_cast<const int8_t *>(m.values) + n * in, m.scales + n * (in / GROUP), x, in)
                                   : dot(static_cast<const uint16_t *>(m.values) + n * in, x, in);
        give(n, sum + (m.bias ? m.bias[n] : 0.0f));
    }
}

// One head: the new key and value go into the cache, and the query attends to all that is there.
void attend(const Model &m, uint16_t *keys, uint16_t *values, const float *qkv, int64_t head, int64_t position, float *scores, float *out) {
    const int64_t size = m.width / m.heads;
    const float *q = qkv + head * size, *k = q + m.width, *v = k + m.width;
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
        for (int64_t l = 0; l < m.layers; l++) {
            const Layer &layer = m.layer[l];
            layer_norm(x, layer.ln_1_weight, layer.ln_1_bias, m.epsilon, C, own.data());
            multiply(layer.attention, own.data(), C, 3 * C, [&](int64_t n, float y) { qkv[n] = y; });
#pragma omp for schedule(static)
            for (int64_t head = 0; head < m.heads; head++) {
                const int64_t place = (l * m.heads + head) * m.capacity * size;
                attend(m, keys + place, values + place, qkv, head, position, scores.data(), mixed + head * size);
            }
            multiply(layer.projection, mixed, C, C, [&](int64_t n, float y) { x[n] += y; });
            layer_norm(x, layer.ln_2_weight, layer.ln_2_bias, m.epsilon, C, own.data());
            multiply(layer.wide, own.data(), C, 4 * C, [&](int64_t n, float y) { wide[n] = gelu(y); });
            multiply(layer.narrow, wide, 4 * C, C, [&](int64_t n, float y) { x[n] += y; });
        }
        layer_norm(x, m.ln_f_weight, m.ln_f_bias, m.epsilon, C, own.data());
        multiply(m.head, own.data(), C, m.vocabulary, [&](int64_t n, float y) { logits[n] = y; });
    }
}
