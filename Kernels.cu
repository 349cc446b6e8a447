// The kernels of the GPU backend, in the order of the operations in Device.cs. The file is compiled twice, for bf16 and
// (-DFP32) for fp32: floatX is the type of weights and activations. Sums and statistics are fp32, and no result depends
// on the order in which blocks run. The number of columns is a multiple of 8, and a thread handles eight elements at a
// time with loads and stores of 128 bits. nvcc unrolls loops of constant length by itself; pragmas mark the others.
#include <cuda.h>
#include <cuda_bf16.h>
#include <stdint.h>

#ifdef FP32
typedef float floatX;
#else
typedef __nv_bfloat16 floatX;
#endif

#define KERNEL extern "C" __global__ void
#define MAP const __grid_constant__ CUtensorMap

constexpr int Warp = 32, Width = 8;

extern __shared__ uint4 shared[]; // its size is set at the launch

// ---- Eight elements at a time

struct Pack { // in registers
    float x[Width];
};

struct alignas(16) Eight { // in memory
    floatX x[Width];
};

// Two floats as bf16, rounded to nearest, the first in the lower half, and back.
__device__ uint32_t pair(float low, float high) {
    __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *(uint32_t*)&both;
}

__device__ float2 unpair(uint32_t both) { return {__uint_as_float(both << 16), __uint_as_float(both & 0xffff0000)}; }

// Rounds x to bf16, up or down with probabilities that keep the mean, by 16 random bits; and two floats, by 32.
__device__ float round_stochastically(float x, uint32_t random) {
    return __uint_as_float((__float_as_uint(x) + (random & 0xffff)) & 0xffff0000);
}

__device__ uint32_t pair_stochastically(float low, float high, uint32_t random) {
    return __byte_perm(__float_as_uint(low) + (random & 0xffff), __float_as_uint(high) + (random >> 16), 0x7632);
}

__device__ Pack load(const float* from) {
    float4 low = *(const float4*)from, high = *(const float4*)(from + 4);
    return {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
}

__device__ Pack widen(uint4 bits) {
    float2 a = unpair(bits.x), b = unpair(bits.y), c = unpair(bits.z), d = unpair(bits.w);
    return {a.x, a.y, b.x, b.y, c.x, c.y, d.x, d.y};
}

__device__ Pack load(const __nv_bfloat16* from) { return widen(*(const uint4*)from); }

__device__ void store(float* to, Pack pack) {
    *(float4*)to = *(float4*)pack.x;
    *(float4*)(to + 4) = *(float4*)(pack.x + 4);
}

__device__ uint4 narrow(Pack pack) {
    float* x = pack.x;
    return make_uint4(pair(x[0], x[1]), pair(x[2], x[3]), pair(x[4], x[5]), pair(x[6], x[7]));
}

__device__ void store(__nv_bfloat16* to, Pack pack) { *(uint4*)to = narrow(pack); }

// Eight elements in registers as they are in memory.
#ifdef FP32
typedef Pack Raw;
__device__ Pack widen(Raw x) { return x; }
__device__ Raw raw(Pack x) { return x; }
#else
typedef uint4 Raw;
__device__ Raw raw(Pack x) { return narrow(x); }
#endif

// f of each element.
template <typename F>
__device__ Pack map(Pack a, F f) {
    for (int i = 0; i < Width; i++)
        a.x[i] = f(a.x[i]);
    return a;
}

__device__ Pack operator+(Pack a, Pack b) {
    for (int i = 0; i < Width; i++)
        a.x[i] += b.x[i];
    return a;
}

__device__ Pack operator*(Pack a, Pack b) {
    for (int i = 0; i < Width; i++)
        a.x[i] *= b.x[i];
    return a;
}

__device__ float sum(Pack a) {
    return ((a.x[0] + a.x[1]) + (a.x[2] + a.x[3])) + ((a.x[4] + a.x[5]) + (a.x[6] + a.x[7]));
}

// (x - mean)·rstd
__device__ Pack normalize(Pack x, float mean, float rstd) {
    for (int i = 0; i < Width; i++)
        x.x[i] = (x.x[i] - mean) * rstd;
    return x;
}

// Sets the elements from index first on to x.
__device__ void fill(Pack& a, int first, float x) {
    for (int i = 0; i < Width; i++)
        a.x[i] = i < first ? a.x[i] : x;
}

// The sum, and the maximum, of x over the lanes at these distances, in this order.
template <int... Distances>
__device__ float sum_lanes(float x) {
    ((x += __shfl_xor_sync(~0u, x, Distances)), ...);
    return x;
}

template <int... Distances>
__device__ float max_lanes(float x) {
    ((x = fmaxf(x, __shfl_xor_sync(~0u, x, Distances))), ...);
    return x;
}

__device__ float warp_sum(float x) {
    for (int distance = Warp / 2; distance > 0; distance /= 2)
        x += __shfl_xor_sync(~0u, x, distance);
    return x;
}

// ---- PTX instructions

#define PTX(name, parameters, ...) \
    __device__ void name parameters { \
        asm volatile(__VA_ARGS__); \
    }
#define PTX_OF_FLOAT(name, instruction) \
    __device__ float name(float x) { \
        asm(instruction " %0, %0;" : "+f"(x)); \
        return x; \
    }

// Addresses in shared memory have 32 bits.
__device__ uint32_t shared_address(const void* pointer) { return (uint32_t)__cvta_generic_to_shared(pointer); }

template <typename T>
__device__ T& at(uint32_t shared_address) { return *(T*)__cvta_shared_to_generic(shared_address); }

PTX(load_shared, (uint4& to, uint32_t from), "ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
    : "=r"(to.x), "=r"(to.y), "=r"(to.z), "=r"(to.w) : "r"(from))
PTX(store_shared, (uint32_t to, uint32_t x), "st.shared.b32 [%0], %1;" ::"r"(to), "r"(x))

// Copies 16 bytes to shared memory; writes zeros instead if not inside.
PTX(cp_async, (uint32_t to, const void* from, bool inside), "cp.async.cg.shared.global [%0], [%1], 16, %2;"
    ::"r"(to), "l"(from), "r"(inside ? 16 : 0))
PTX(cp_async_commit, (), "cp.async.commit_group;" ::)
PTX(cp_async_wait, (), "cp.async.wait_group 0;" ::: "memory")

#if __CUDA_ARCH__ >= 900
#define TRY_WAIT "try_wait"
#else
#define TRY_WAIT "test_wait"
#endif

// Barriers in shared memory. A phase ends when all have arrived and all expected bytes are there.
struct Barriers {
    uint32_t first; // address
    __device__ uint32_t operator[](int i) const { return first + 8 * i; }
};
PTX(mbarrier_init, (uint32_t barrier, int arrivals),
    "mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals))
PTX(mbarrier_init_fence, (), "fence.mbarrier_init.release.cluster;" ::: "memory")
PTX(mbarrier_arrive, (uint32_t barrier), "mbarrier.arrive.shared.b64 _, [%0];" ::"r"(barrier) : "memory")
PTX(mbarrier_expect, (uint32_t barrier, int bytes),
    "mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory")
PTX(mbarrier_wait, (uint32_t barrier, int phase),
    "{\n.reg .pred done;\nagain:\nmbarrier." TRY_WAIT ".parity.shared.b64 done, [%0], %1;\n@!done bra again;\n}"
    ::"r"(barrier), "r"(phase & 1) : "memory")

// Arrives at this barrier in another block of the cluster; send also writes x there.
PTX(mbarrier_arrive_at, (uint32_t barrier, uint32_t rank),
    "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
    "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier), "r"(rank) : "memory")
PTX(send, (int x, uint32_t to, uint32_t barrier, uint32_t rank),
    "{\n.reg .b32 there, signal;\nmapa.shared::cluster.u32 there, %1, %3;\n"
    "mapa.shared::cluster.u32 signal, %2, %3;\n"
    "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [there], %0, [signal];\n}"
    ::"r"(x), "r"(to), "r"(barrier), "r"(rank) : "memory")

// TMA loads bytes, rows of a head, a box of a matrix, and such a box into both blocks of the cluster.
#define TO_SHARED ".shared::cluster.global.mbarrier::complete_tx::bytes"
PTX(load_bytes, (uint32_t to, const void* from, int bytes, uint32_t barrier),
    "cp.async.bulk" TO_SHARED " [%0], [%1], %2, [%3];"
    ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory")
PTX(load_head, (uint32_t to, const CUtensorMap* map, int head, int row, int sequence, uint32_t barrier),
    "cp.async.bulk.tensor.4d" TO_SHARED " [%0], [%1, {%2, %3, %4, %5}], [%6];"
    ::"r"(to), "l"(map), "r"(0), "r"(head), "r"(row), "r"(sequence), "r"(barrier) : "memory")
PTX(load_box, (uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier),
    "cp.async.bulk.tensor.2d" TO_SHARED " [%0], [%1, {%2, %3}], [%4];"
    ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier) : "memory")
PTX(load_box_to_both, (uint32_t to, const CUtensorMap* map, int column, int row, uint32_t barrier),
    "cp.async.bulk.tensor.2d" TO_SHARED ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;"
    ::"r"(to), "l"(map), "r"(column), "r"(row), "r"(barrier), "h"((uint16_t)3) : "memory")

// TMA stores a box of a matrix, the first for the L2 to evict. The fence makes writes to shared memory visible to TMA.
PTX(store_box, (const CUtensorMap* map, int column, int row, uint32_t from),
    "{\n.reg .b64 policy;\ncreatepolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
    "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%1, %2}], [%3], policy;\n}"
    ::"l"(map), "r"(column), "r"(row), "r"(from) : "memory")
PTX(store_box_fence, (), "fence.proxy.async.shared::cta;" ::: "memory")
PTX(store_box_commit, (), "cp.async.bulk.commit_group;" ::: "memory")
PTX(store_box_wait, (), "cp.async.bulk.wait_group.read 0;" ::: "memory") // until TMA has read shared memory

// Four 8 x 8 matrices in bf16; each lane has the address of a row.
PTX(ldmatrix, (uint32_t (&to)[4], uint32_t from), "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from))
PTX(ldmatrix_transposed, (uint32_t (&to)[4], uint32_t from),
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
    : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3]) : "r"(from))
PTX(stmatrix, (uint32_t to, const uint32_t (&x)[4]), "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
    ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory")

// c (16, 8) += a (16, 16) · b (16, 8)
PTX(mma, (float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
    "{%0, %1, %2, %3};" : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
PTX(wgmma_fence, (), "wgmma.fence.sync.aligned;" ::: "memory")
PTX(wgmma_commit, (), "wgmma.commit_group.sync.aligned;" ::: "memory")

// Exact to about 22, 22 and 11 bits. The first two flush denormals to zero.
PTX_OF_FLOAT(exp2_approximate, "ex2.approx.ftz.f32")
PTX_OF_FLOAT(inverse_approximate, "rcp.approx.ftz.f32")
PTX_OF_FLOAT(tanh_approximate, "tanh.approx.f32")

// ---- Sums of rows

constexpr int SumThreads = 256;

// Sums rows row(0) to row(count - 1) of x (.., C) and, in one thread per column, calls then(column, sum). A block has
// Columns of the columns, eight of them per thread, and divides the rows among its threads.
template <int Columns, typename T, typename Row, typename Then>
__device__ void sum_rows(const T* x, int C, int count, Row row, Then then) {
    constexpr int Across = Columns / Width, Down = SumThreads / Across;
    __shared__ float sums[Down][Columns];
    int down = threadIdx.x / Across, first = blockIdx.y * Columns, own_first = first + threadIdx.x % Across * Width;
    Pack own = {};
    if (own_first < C) {
#pragma unroll 4
        for (int i = down; i < count; i += Down)
            own = own + load(x + (int64_t)row(i) * C + own_first);
    }
    store(&sums[down][own_first - first], own);
    __syncthreads();
    int column = first + threadIdx.x;
    float total = 0;
    for (int i = 0; i < Down && threadIdx.x < Columns; i++)
        total += sums[i][threadIdx.x];
    if (threadIdx.x < Columns && column < C)
        then(column, total);
}

// partial (blocks, C) = the sums of x (rows, C) over each block's share of the rows.
KERNEL sum_rows_partially(const floatX* x, int rows, int C, float* partial) {
    int first = (int64_t)rows * blockIdx.x / gridDim.x, end = (int64_t)rows * (blockIdx.x + 1) / gridDim.x;
    sum_rows<256>(x, C, end - first, [=](int i) { return first + i; },
        [=](int column, float sum) { partial[(int64_t)blockIdx.x * C + column] = sum; });
}

// db (C), dw (C) and dbias (C) += the column sums of partial (3, count, C), or fewer: one per layer (z) of the grid.
KERNEL add_row_sums(const float* partial, int count, int C, float* db, float* dw, float* dbias) {
    sum_rows<32>(partial + (int64_t)blockIdx.z * count * C, C, count, [](int i) { return i; },
        [=](int column, float sum) { (blockIdx.z == 0 ? db : blockIdx.z == 1 ? dw : dbias)[column] += sum; });
}

// ---- Embedding

// x (B, T, C) = wte (V, C) at the tokens (B, T) + wpe (maxT, C) at the positions. One block per row.
KERNEL embed(const int* tokens, const floatX* wte, const floatX* wpe, floatX* x, int T, int C) {
    int64_t row = blockIdx.x;
    const floatX *token = wte + (int64_t)tokens[row] * C, *position = wpe + row % T * C;
    for (int c = threadIdx.x * Width; c < C; c += blockDim.x * Width)
        store(x + row * C + c, load(token + c) + load(position + c));
}

// dwte (V, C) += dx (B·T, C), summed by token. order (B·T) has the rows sorted by token, and first (V + 1) where each
// token's rows begin in it. One block per token.
KERNEL embed_backward_tokens(const int* order, const int* first, const floatX* dx, float* dwte, int C) {
    int begin = first[blockIdx.x], count = first[blockIdx.x + 1] - begin;
    if (count > 0)
        sum_rows<256>(dx, C, count, [=](int i) { return order[begin + i]; },
            [=](int column, float sum) { dwte[(int64_t)blockIdx.x * C + column] += sum; });
}

// dwpe (maxT, C) += the sums of dx (B, T, C) over the batch. One block per position.
KERNEL embed_backward_positions(const floatX* dx, float* dwpe, int B, int T, int C) {
    sum_rows<256>(dx, C, B, [=](int b) { return b * T + blockIdx.x; },
        [=](int column, float sum) { dwpe[(int64_t)blockIdx.x * C + column] += sum; });
}

// ---- Layer norm

// y (rows, C) = normalized x (rows, C) · w (C) + b (C); statistics (rows) = each row's mean and 1/deviation. One warp
// per row, which it keeps in shared memory; each lane reads back only what it wrote.
KERNEL layer_norm(const floatX* x, const floatX* w, const floatX* b, floatX* y, float2* statistics, int rows, int C) {
    int warp = threadIdx.x / Warp, lane = threadIdx.x % Warp;
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / Warp) + warp;
    if (row >= rows)
        return;
    floatX* kept = (floatX*)shared + warp * C;
    float total = 0, squares = 0;
    for (int c = lane * Width; c < C; c += Warp * Width) {
        Pack value = load(x + row * C + c);
        store(kept + c, value);
        total += sum(value);
    }
    float mean = warp_sum(total) / C;
    for (int c = lane * Width; c < C; c += Warp * Width) {
        Pack difference = normalize(load(kept + c), mean, 1);
        squares += sum(difference * difference);
    }
    float rstd = rsqrtf(warp_sum(squares) / C + 1e-5f);
    for (int c = lane * Width; c < C; c += Warp * Width)
        store(y + row * C + c, normalize(load(kept + c), mean, rstd) * load(w + c) + load(b + c));
    if (lane == 0)
        statistics[row] = make_float2(mean, rstd);
}

constexpr int NormBackwardThreads = 512;

// dx (rows, C) += the gradient of x (rows, C), from dy (rows, C), w (C) and statistics (rows). partial (sums, blocks,
// C) = each block's part of db, dw and, if sums is 3, dbias = Σ dx. A group of warps, as wide as a row, takes two rows
// at a time; a thread has eight columns.
KERNEL __launch_bounds__(NormBackwardThreads) layer_norm_backward(const floatX* dy, const floatX* x, const floatX* w,
    const float2* statistics, floatX* dx, float* partial, int rows, int C, int sums) {
    constexpr int Together = 2; // rows
    __shared__ float2 parts[2][Together][NormBackwardThreads / Warp];
    int across = (C + Warp * Width - 1) / (Warp * Width), warp = threadIdx.x / Warp, group = warp / across;
    int groups = blockDim.x / Warp / across, c = threadIdx.x % (across * Warp) * Width, turn = 0;
    bool inside = c < C;
    Eight weights = *(const Eight*)(w + (inside ? c : 0));
    Pack db = {}, dw = {}, dbias = {};
    float share = 1.0f / C; // of one column in a mean
    int first = (blockIdx.x * groups + group) * Together, step = gridDim.x * groups * Together;
    struct {
        Eight x, dy, dx;
        float2 statistics;
    } own[Together], next[Together];
    auto load_next = [&](int first) {
        for (int r = 0; r < Together; r++) {
            int row = min(first + r, rows - 1);
            int64_t at = (int64_t)row * C + (inside ? c : 0);
            next[r] = {*(const Eight*)(x + at), *(const Eight*)(dy + at), *(const Eight*)(dx + at), statistics[row]};
        }
    };
    load_next(first);
    for (; first < rows; first += step, turn ^= 1) {
        for (int r = 0; r < Together; r++) {
            own[r] = next[r];
            if (!inside || first + r >= rows)
                own[r].dy = {};
        }
        load_next(first + step);
        // With g = dy·w and z = normalized x: dx = rstd·(g − mean(g) − z·mean(g·z)).
        for (int r = 0; r < Together; r++) {
            Pack z = normalize(load(own[r].x.x), own[r].statistics.x, own[r].statistics.y), dout = load(own[r].dy.x);
            Pack g = dout * load(weights.x);
            db = db + dout;
            dw = dw + dout * z;
            float2 means = {warp_sum(sum(g)) * share, warp_sum(sum(g * z)) * share};
            if (threadIdx.x % Warp == 0)
                parts[turn][r][warp] = means;
        }
        asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "r"(across * Warp) : "memory");
#pragma unroll
        for (int r = 0; r < Together; r++) {
            float mean_g = 0, mean_gz = 0, rstd = own[r].statistics.y;
            for (int i = 0; i < across; i++) {
                mean_g += parts[turn][r][group * across + i].x;
                mean_gz += parts[turn][r][group * across + i].y;
            }
            Pack z = normalize(load(own[r].x.x), own[r].statistics.x, rstd), g = load(own[r].dy.x) * load(weights.x);
            Pack result = load(own[r].dx.x);
            for (int i = 0; i < Width; i++)
                result.x[i] += rstd * (g.x[i] - mean_g - z.x[i] * mean_gz);
            if (inside && first + r < rows) {
                store(dx + (int64_t)(first + r) * C + c, result);
                dbias = dbias + result;
            }
        }
    }
    // Groups add their sums one after the other.
    float* total = (float*)shared;
    for (int i = 0; i < groups; i++) {
        __syncthreads();
        Pack all[3] = {db, dw, dbias};
        for (int k = 0; k < 3; k++) {
            float* at = i < groups - 1 ? total + k * C + c : partial + ((int64_t)k * gridDim.x + blockIdx.x) * C + c;
            if (group == i && inside && k < sums)
                store(at, i == 0 ? all[k] : load(total + k * C + c) + all[k]);
        }
    }
}

// ---- GELU

constexpr float Log2E = 1.4426950408889634f;

// GELU(x)/x = (1 + tanh u)/2 = 1/(1 + e^−2u) with u = √(2/π)·(x + 0.044715·x³).
__device__ float gelu_gate(float x) {
    constexpr float Scale = -2 * 0.7978845608f * Log2E;
    return inverse_approximate(1 + exp2_approximate(x * (Scale + Scale * 0.044715f * (x * x))));
}

__device__ float gelu_of(float x) { return x * gelu_gate(x); }

__device__ float gelu_slope(float x) {
    constexpr float Scale = 2 * 0.7978845608f;
    float gate = gelu_gate(x);
    return gate + (gate - gate * gate) * (x * (Scale + Scale * 3 * 0.044715f * (x * x)));
}

// GELU'(x) to about 11 bits.
__device__ float gelu_slope_approximate(float x) {
    constexpr float Scale = 0.7978845608f, Cubic = 0.044715f;
    float tanh = tanh_approximate(x * (Scale + Scale * Cubic * (x * x)));
    float half_du = Scale / 2 + Scale / 2 * Cubic * 3 * (x * x);
    return 0.5f + 0.5f * tanh + (1 - tanh * tanh) * (x * half_du);
}

// y = GELU(x), both of count elements.
KERNEL gelu(const floatX* x, floatX* y, int64_t count) {
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * Width;
    if (i < count)
        store(y + i, map(load(x + i), gelu_of));
}

// dx *= GELU'(x), both of count elements.
KERNEL gelu_backward(const floatX* x, floatX* dx, int64_t count) {
    int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * Width;
    if (i < count)
        store(dx + i, load(dx + i) * map(load(x + i), gelu_slope));
}

// ---- Attention for heads of any size

constexpr int HeadWarps = 8, LargestHead = 256;

// A vector (HS) spread over a warp: each lane has every 32nd element.
struct Head {
    float x[LargestHead / Warp];

    __device__ Head(const floatX* from = nullptr, int HS = 0) : x() {
        for (int j = 0; j < LargestHead / Warp; j++) {
            if (int i = j * Warp + threadIdx.x % Warp; i < HS)
                x[j] = from[i];
        }
    }

    __device__ void add(float factor, const Head& other) {
        for (int j = 0; j < LargestHead / Warp; j++)
            x[j] += factor * other.x[j];
    }
};

__device__ float dot(const Head& a, const Head& b) {
    float total = 0;
    for (int j = 0; j < LargestHead / Warp; j++)
        total += a.x[j] * b.x[j];
    return warp_sum(total);
}

// to (HS) = the sum of own · factor over the block's warps.
__device__ void combine(const Head& own, float factor, floatX* to, int HS) {
    __shared__ float all[HeadWarps][LargestHead];
    __syncthreads();
    for (int j = 0; j < LargestHead / Warp; j++)
        all[threadIdx.x / Warp][j * Warp + threadIdx.x % Warp] = factor * own.x[j];
    __syncthreads();
    for (int i = threadIdx.x; i < HS; i += blockDim.x) {
        float total = 0;
        for (int warp = 0; warp < HeadWarps; warp++)
            total += all[warp][i];
        to[i] = total;
    }
}

// y (B, T, NH·HS) and lse (B, NH, T) from qkv (B, T, 3, NH·HS). One block per query (x), head (y) and sequence (z),
// whose warps divide the keys.
KERNEL attention_any(const floatX* qkv, floatX* y, float* lse, int T, int NH, int HS) {
    __shared__ float maxima[HeadWarps], sums[HeadWarps];
    int warp = threadIdx.x / Warp, C = NH * HS, row = blockIdx.x;
    const floatX* head = qkv + (int64_t)blockIdx.z * T * 3 * C + blockIdx.y * HS;
    Head q(head + (int64_t)row * 3 * C, HS), own;
    float max = -INFINITY, total = 0, scale = rsqrtf(HS);
    for (int key = warp; key <= row; key += HeadWarps) {
        const floatX* at = head + (int64_t)key * 3 * C;
        float score = scale * dot(q, Head(at + C, HS)), new_max = fmaxf(max, score);
        float keep = __expf(max - new_max), p = __expf(score - new_max);
        total = total * keep + p;
        own.add(keep - 1, own); // own *= keep
        own.add(p, Head(at + 2 * C, HS));
        max = new_max;
    }
    maxima[warp] = max;
    sums[warp] = total;
    __syncthreads();
    float all_max = -INFINITY, all = 0;
    for (int i = 0; i < HeadWarps; i++)
        all_max = fmaxf(all_max, maxima[i]);
    for (int i = 0; i < HeadWarps; i++)
        all += sums[i] * __expf(maxima[i] - all_max);
    int64_t out = (int64_t)blockIdx.z * T + row;
    combine(own, __expf(max - all_max) / all, y + out * C + blockIdx.y * HS, HS);
    if (threadIdx.x == 0)
        lse[((int64_t)blockIdx.z * NH + blockIdx.y) * T + row] = all_max + __logf(all);
}

// dq in dqkv (B, T, 3, NH·HS), and delta (B, NH, T) = Σ dy·y, from dy and y (B, T, NH·HS), qkv (B, T, 3, NH·HS) and lse
// (B, NH, T). Blocks as above.
KERNEL attention_any_backward_q(const floatX* dy, const floatX* qkv, const floatX* y, const float* lse, float* delta,
    floatX* dqkv, int T, int NH, int HS) {
    int C = NH * HS, row = blockIdx.x;
    int64_t first = (int64_t)blockIdx.z * T, out = (first + row) * C + blockIdx.y * HS;
    int64_t statistic = ((int64_t)blockIdx.z * NH + blockIdx.y) * T + row;
    const floatX* head = qkv + first * 3 * C + blockIdx.y * HS;
    Head q(head + (int64_t)row * 3 * C, HS), dout(dy + out, HS), own;
    float scale = rsqrtf(HS), own_delta = dot(dout, Head(y + out, HS));
    for (int key = threadIdx.x / Warp; key <= row; key += HeadWarps) {
        const floatX* at = head + (int64_t)key * 3 * C;
        Head k(at + C, HS);
        float p = __expf(scale * dot(q, k) - lse[statistic]);
        own.add(scale * p * (dot(dout, Head(at + 2 * C, HS)) - own_delta), k);
    }
    combine(own, 1, dqkv + (first + row) * 3 * C + blockIdx.y * HS, HS);
    if (threadIdx.x == 0)
        delta[statistic] = own_delta;
}

// dk and dv in dqkv, from the same arrays and delta. One block per key, whose warps divide the queries from it on.
KERNEL attention_any_backward_kv(const floatX* dy, const floatX* qkv, const float* lse, const float* delta,
    floatX* dqkv, int T, int NH, int HS) {
    int C = NH * HS, key = blockIdx.x;
    int64_t first = (int64_t)blockIdx.z * T, statistics = ((int64_t)blockIdx.z * NH + blockIdx.y) * T;
    const floatX* head = qkv + first * 3 * C + blockIdx.y * HS;
    Head k(head + (int64_t)key * 3 * C + C, HS), v(head + (int64_t)key * 3 * C + 2 * C, HS), dk, dv;
    float scale = rsqrtf(HS);
    for (int row = key + threadIdx.x / Warp; row < T; row += HeadWarps) {
        Head q(head + (int64_t)row * 3 * C, HS), dout(dy + (first + row) * C + blockIdx.y * HS, HS);
        float p = __expf(scale * dot(q, k) - lse[statistics + row]);
        dv.add(p, dout);
        dk.add(scale * p * (dot(dout, v) - delta[statistics + row]), q);
    }
    floatX* to = dqkv + (first + key) * 3 * C + blockIdx.y * HS;
    combine(dk, 1, to + C, HS);
    combine(dv, 1, to + 2 * C, HS);
}

// ---- Flash attention (Dao, 2023) for heads of 64

#ifndef FP32
// Causal attention from qkv (B, T, 3, NH, 64) to y (B, T, NH, 64), without atomics. A block has 128 rows (queries, or
// keys in the kernel for dk and dv) in two warpgroups, and walks over the others in tiles of 64. There are two kinds of
// products: scores = rows·tileᵀ, from shared memory, and sums += weights·tile, whose weights are scores in registers.
// Four warps with mma.m16n8k16 hold them as wgmma.m64n64k16 does, so that each kernel is written once, for any GPU and,
// with wgmma and TMA, for Hopper.
constexpr int HS = 64, TileRows = 64, TileBytes = TileRows * HS * 2;
constexpr int FlashThreads = 256, FlashRows = 128, HopperKeyRows = 192;

typedef float Accumulators[8][4]; // a warp's (16, 64), as [column / 8][2·(row / 8) + column % 2]
typedef uint32_t Fragments[4][4]; // a warp's (16, 64) in bf16

// body(j, i) for each of a thread's accumulators.
template <typename Body>
__device__ void each(Body body) {
    for (int j = 0; j < 8; j++) {
        for (int i = 0; i < 4; i++)
            body(j, i);
    }
}

// The address of eight columns of a row in a tile. Chunks of 16 bytes are swizzled as TMA and wgmma do with rows of 128
// bytes, which avoids bank conflicts.
__device__ uint32_t swizzled(uint32_t tile, int row, int column8) {
    return tile + row * 128 + ((column8 ^ (row & 7)) << 4);
}

// x, the same in every lane: this lets the compiler compute with it once per warp.
__device__ int uniform(int x) { return __shfl_sync(~0u, x, 0); }

// Tiles begin at a multiple of 1024 bytes, as the swizzling requires.
__device__ uint32_t first_tile() { return (shared_address(shared) + 1023) & ~1023; }

// One head's rows (T, 64) of this block's sequence, in an array (B, T, heads, 64); map describes it to TMA.
template <bool Hopper>
struct Rows {
    const floatX* from;
    const CUtensorMap* map;
    int heads, head, T;

    __device__ Rows(const floatX* array, const CUtensorMap* map, int heads, int head, int T)
        : from(array + ((int64_t)blockIdx.z * T * heads + head) * HS), map(map), heads(heads), head(head), T(T) { }

    // Copies rows [first, first + Count) to tiles, with zeros from row T on.
    template <int Count>
    __device__ void load(uint32_t tiles, int first, uint32_t barrier) const {
        if constexpr (Hopper) {
            for (int i = 0; threadIdx.x == 0 && i < Count; i += TileRows)
                load_head(tiles + i * 128, map, head, first + i, blockIdx.z, barrier);
        } else {
            int row = threadIdx.x / 8, step = FlashThreads / 8, stride = heads * HS;
            uint32_t to = swizzled(tiles, row, threadIdx.x % 8);
            const floatX* at = from + (int64_t)(first + row) * stride + threadIdx.x % 8 * Width;
            for (int i = 0; i < Count; i += step)
                cp_async(to + i * 128, at + i * stride, first + row + i < T);
        }
    }
};

__shared__ uint64_t pair_barriers[6];

// Walks over tiles [begin, end) of two heads' rows, and the rows' statistics (T) if any, in pairs. They pass through a
// ring in shared memory: of two places that all threads fill in turn, or three that TMA fills ahead.
template <bool Hopper, bool HasStatistics>
struct Pairs {
    static constexpr int Places = Hopper ? 3 : 2;
    static constexpr int StatisticsBytes = HasStatistics ? TileRows * sizeof(float2) : 0;
    static constexpr int Bytes = 2 * TileBytes + StatisticsBytes;

    const Rows<Hopper>&left, &right;
    const float2* all_statistics; // (T)
    uint32_t ring;
    int tile, end, place = 0, phase = 0;
    Barriers full{shared_address(pair_barriers)}, empty{full[Places]}; // of each place

    // The current pair: the left tile, followed by the right one.
    __device__ uint32_t tiles() const { return ring + place * 2 * TileBytes; }

    __device__ uint32_t statistics(int place) const { return ring + Places * 2 * TileBytes + place * StatisticsBytes; }

    __device__ void load(int tile, int place) const {
        uint32_t to = ring + place * 2 * TileBytes;
        left.template load<TileRows>(to, tile * TileRows, full[place]);
        right.template load<TileRows>(to + TileBytes, tile * TileRows, full[place]);
        if constexpr (HasStatistics) {
            const float2* from = all_statistics + tile * TileRows;
            if (Hopper && threadIdx.x == 0)
                load_bytes(statistics(place), from, StatisticsBytes, full[place]);
            else if (!Hopper && threadIdx.x < StatisticsBytes / 16)
                cp_async(statistics(place) + threadIdx.x * 16, from + threadIdx.x * 2, true);
        }
        if (!Hopper)
            cp_async_commit();
    }

    // Starts to load the first pairs and, by others(barrier), so many bytes that the kernel needs all along.
    template <typename Load>
    __device__ void start(int bytes, Load others) const {
        if constexpr (Hopper) {
            if (threadIdx.x == 0) {
                for (int i = 0; i < Places; i++) {
                    mbarrier_init(full[i], 1);
                    mbarrier_init(empty[i], blockDim.x / Warp);
                }
                mbarrier_init_fence();
            }
            __syncthreads();
        }
        if (Hopper && threadIdx.x == 0)
            mbarrier_expect(full[0], Bytes + bytes);
        others(full[0]);
        load(tile, 0);
        for (int i = 1; Hopper && threadIdx.x == 0 && i < Places && tile + i < end; i++) {
            mbarrier_expect(full[i], Bytes);
            load(tile + i, i);
        }
    }

    // Waits for the current pair; without TMA, also starts to load the next one.
    __device__ void wait() const {
        if constexpr (Hopper) {
            mbarrier_wait(full[place], phase);
        } else {
            cp_async_wait();
            __syncthreads();
            if (tile + 1 < end)
                load(tile + 1, place ^ 1);
        }
    }

    // Has TMA load another pair in place of the previous one, once every warp is done with that.
    __device__ void refill(int begin) const {
        if (Hopper && threadIdx.x == 0 && tile > begin && tile + Places - 1 < end) {
            int before = place == 0 ? Places - 1 : place - 1;
            mbarrier_wait(empty[before], place == 0 ? phase ^ 1 : phase);
            mbarrier_expect(full[before], Bytes);
            load(tile + Places - 1, before);
        }
    }

    __device__ void next() {
        if (Hopper && threadIdx.x % Warp == 0)
            mbarrier_arrive(empty[place]);
        tile++;
        if (++place == Places) {
            place = 0;
            phase ^= 1;
        }
    }
};

// ---- Products of tiles

// Tells wgmma where 64 rows begin in a swizzled tile, and that groups of eight rows are 1024 bytes apart.
__device__ uint64_t descriptor(uint32_t tile, int bytes) {
    uint64_t descriptor;
    uint32_t low = (tile >> 4 | 1 << 16) + (bytes >> 4);
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low), "n"(1024 >> 4 | 1 << 30));
    return descriptor;
}

// c = a·b, or c += a·b, over a depth of 16, by four warps in the background until wgmma_wait. a is rows of a tile, or
// fragments. The rows of b's tile are the columns of b or, with fragments, its depth.
#define ROW(j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define ALL_ROWS ROW(0), ROW(1), ROW(2), ROW(3), ROW(4), ROW(5), ROW(6), ROW(7)
#define REGISTERS_32 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {" REGISTERS_32 "}, "

__device__ void wgmma(Accumulators& c, uint64_t a, uint64_t b, bool accumulate) {
    asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" WGMMA "%32, %33, p, 1, 1, 0, 0;\n}"
        : ALL_ROWS : "l"(a), "l"(b), "r"((int)accumulate));
}

__device__ void wgmma(Accumulators& c, const uint32_t (&a)[4], uint64_t b) {
    asm volatile(WGMMA "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
        : ALL_ROWS : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// Waits until at most the last Pending groups of products are unfinished; c belongs to an earlier one.
template <bool Hopper, int Pending>
__device__ void wgmma_wait(Accumulators& c) {
    if constexpr (Hopper)
        asm volatile("wgmma.wait_group.sync.aligned %32;" : ALL_ROWS : "n"(Pending) : "memory");
}

// scores (64, 64) = rows (64, 64) · tile (64, 64)ᵀ, for a warpgroup.
template <bool Hopper>
__device__ void multiply_transposed(Accumulators& scores, uint32_t rows, uint32_t tile) {
    if constexpr (Hopper) {
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < 4; k++)
            wgmma(scores, descriptor(rows, k * 32), descriptor(tile, k * 32), k > 0);
        wgmma_commit();
    } else {
        int lane = threadIdx.x % Warp, row = threadIdx.x / Warp % 4 * 16;
        each([&](int j, int i) { scores[j][i] = 0; });
        for (int k = 0; k < 4; k++) {
            uint32_t a[4], b[4];
            ldmatrix(a, swizzled(rows, row + lane % 16, 2 * k + lane / 16));
            for (int j = 0; j < 8; j += 2) {
                ldmatrix(b, swizzled(tile, j * 8 + lane / 16 * 8 + lane % 8, 2 * k + lane / 8 % 2));
                mma(scores[j], a, b[0], b[1]);
                mma(scores[j + 1], a, b[2], b[3]);
            }
        }
    }
}

// sums (64, 64) += weights (64, 64) · tile (64, 64), for a warpgroup.
template <bool Hopper>
__device__ void multiply_add(Accumulators& sums, const Fragments& weights, uint32_t tile) {
    if constexpr (Hopper) {
        wgmma_fence();
        for (int k = 0; k < 4; k++)
            wgmma(sums, weights[k], descriptor(tile, k * 16 * 128));
        wgmma_commit();
    } else {
        int lane = threadIdx.x % Warp;
        for (int k = 0; k < 4; k++) {
            for (int j = 0; j < 8; j += 2) {
                uint32_t b[4];
                ldmatrix_transposed(b, swizzled(tile, k * 16 + lane % 16, j + lane / 16));
                mma(sums[j], weights[k], b[0], b[1]);
                mma(sums[j + 1], weights[k], b[2], b[3]);
            }
        }
    }
}

// Rounds accumulators to bf16, as weights of the next product.
__device__ void to_fragments(Fragments& to, const Accumulators& from) {
    for (int k = 0; k < 4; k++) {
        for (int i = 0; i < 4; i++)
            to[k][i] = pair(from[2 * k + i / 2][i % 2 * 2], from[2 * k + i / 2][i % 2 * 2 + 1]);
    }
}

// The row, among the warpgroup's 64, and the column of an accumulator.
__device__ int row_of(int i) { return threadIdx.x / Warp % 4 * 16 + threadIdx.x % Warp / 4 + i / 2 * 8; }
__device__ int column_of(int j, int i) { return j * 8 + threadIdx.x % 4 * 2 + i % 2; }

// Hides keys after the query in a tile on the diagonal, whose columns are keys or, if transposed, queries.
__device__ void mask(Accumulators& scores, bool transposed) {
    each([&](int j, int i) {
        if (transposed ? column_of(j, i) < row_of(i) : column_of(j, i) > row_of(i))
            scores[j][i] = -INFINITY;
    });
}

// Writes a warp's 16 rows, the upper eight times factor0 and the lower times factor1, to rows from first on of a head
// in array (B, T, heads, 64). They pass through the warp's rows of a tile, which then get their sums (64) if Sums.
template <bool Sums>
__device__ void store_rows(const Accumulators& from, float factor0, float factor1, uint32_t tile, floatX* array,
    int heads, int head, int first, int T) {
    int lane = threadIdx.x % Warp, row = threadIdx.x / Warp * 16;
    floatX* to = array + ((int64_t)(blockIdx.z * T + first + row) * heads + head) * HS;
    for (int j = 0; j < 8; j++) {
        uint32_t above = swizzled(tile, row + lane / 4, j) + lane % 4 * 4, below = above + 8 * 128;
        store_shared(above, pair(from[j][0] * factor0, from[j][1] * factor0));
        store_shared(below, pair(from[j][2] * factor1, from[j][3] * factor1));
    }
    __syncwarp();
    Pack sums = {};
#pragma unroll
    for (int i = lane; i < 16 * 8; i += Warp) {
        uint4 bits;
        load_shared(bits, swizzled(tile, row + i / 8, i % 8));
        if (first + row + i / 8 < T) {
            *(uint4*)(to + (int64_t)(i / 8) * heads * HS + i % 8 * Width) = bits;
            if (Sums)
                sums = sums + load((floatX*)&bits);
        }
    }
    if (Sums) {
        sums = map(sums, sum_lanes<8, 16>);
        if (lane < 8)
            store(&at<float>(tile + row * 128 + lane * Width * sizeof(float)), sums);
    }
}

// partial (64) = the sum of the sums that store_rows left in the tile.
template <int Rows>
__device__ void store_sums(uint32_t tile, float* partial) {
    if (threadIdx.x >= HS)
        return;
    float total = 0;
    for (int row = 0; row < Rows; row += 16)
        total += at<float[HS]>(tile + row * 128)[threadIdx.x];
    partial[threadIdx.x] = total;
}

// ---- The three kernels

// y (B, T, NH, 64) and lse (B, NH, T) from qkv (B, T, 3, NH, 64). One block per 128 queries (x), head (y) and sequence
// (z); the last queries, which have most to do, come first.
template <bool Hopper>
__device__ void flash_forward(const CUtensorMap* map, const floatX* qkv, floatX* y, float* lse, int T, int NH) {
    int first = (gridDim.x - 1 - blockIdx.x) * FlashRows, warpgroup = uniform(threadIdx.x / 128);
    int own_first = first + warpgroup * TileRows; // of this warpgroup's queries
    uint32_t queries = first_tile(), own_queries = queries + warpgroup * TileBytes;
    Rows<Hopper> q(qkv, map, 3 * NH, blockIdx.y, T), k(qkv, map, 3 * NH, NH + blockIdx.y, T);
    Rows<Hopper> v(qkv, map, 3 * NH, 2 * NH + blockIdx.y, T);
    int end = (min(first + FlashRows, T) - 1) / TileRows + 1;
    Pairs<Hopper, false> pairs{k, v, nullptr, queries + 2 * TileBytes, 0, end};
    pairs.start(2 * TileBytes, [&](uint32_t barrier) { q.template load<FlashRows>(queries, first, barrier); });

    Fragments weights;
    Accumulators scores, sums = {};
    float max[2] = {-INFINITY, -INFINITY}, total[2] = {}, scale = rsqrtf(HS) * Log2E;
    for (; pairs.tile < pairs.end; pairs.next()) {
        pairs.wait();
        if (pairs.tile * TileRows <= own_first) {
            uint32_t keys = pairs.tiles(), values = keys + TileBytes;
            multiply_transposed<Hopper>(scores, own_queries, keys);
            pairs.refill(0);
            wgmma_wait<Hopper, 0>(scores);
            if (pairs.tile * TileRows == own_first)
                mask(scores, false);
            float new_max[2] = {max[0], max[1]};
            each([&](int j, int i) { new_max[i / 2] = fmaxf(new_max[i / 2], scores[j][i]); });
            new_max[0] = max_lanes<1, 2>(new_max[0]); // four threads share a row
            new_max[1] = max_lanes<1, 2>(new_max[1]);
            // What is subtracted cancels out, so the old maximum will do while exponentials stay below 2^8.
            if (__any_sync(~0u, fmaxf(new_max[0] - max[0], new_max[1] - max[1]) * scale > 8)) {
                float keep[2];
                for (int i = 0; i < 2; i++) {
                    keep[i] = exp2_approximate((max[i] - new_max[i]) * scale);
                    max[i] = new_max[i];
                    total[i] *= keep[i];
                }
                each([&](int j, int i) { sums[j][i] *= keep[i / 2]; });
            }
            float shift[2] = {max[0] * scale, max[1] * scale};
            each([&](int j, int i) {
                scores[j][i] = exp2_approximate(scores[j][i] * scale - shift[i / 2]);
                total[i / 2] += scores[j][i];
            });
            to_fragments(weights, scores);
            multiply_add<Hopper>(sums, weights, values);
            wgmma_wait<Hopper, 0>(sums);
        }
    }
    total[0] = sum_lanes<1, 2>(total[0]);
    total[1] = sum_lanes<1, 2>(total[1]);
    __syncthreads();
    store_rows<false>(sums, 1 / total[0], 1 / total[1], queries, y, NH, blockIdx.y, first, T);
    for (int i = 0; i < 2; i++) {
        int row = own_first + row_of(2 * i);
        if (threadIdx.x % 4 == 0 && row < T)
            lse[((int64_t)blockIdx.z * NH + blockIdx.y) * T + row] = max[i] * (scale / Log2E) + logf(total[i]);
    }
}

// A head's row of statistics (B, NH, T rounded up to 64): each query's lse/ln 2 and delta = Σ dy·y; zeros from T on.
__device__ float2* statistics_row(float2* statistics, int T, int NH) {
    return statistics + ((int64_t)blockIdx.z * NH + blockIdx.y) * ((T + TileRows - 1) / TileRows * TileRows);
}

// dq in dqkv (B, T, 3, NH, 64), each block's sums of it in partial (B, blocks, NH, 64), and statistics, from dy and y
// (B, T, NH, 64), qkv (B, T, 3, NH, 64) and lse (B, NH, T). Blocks as in flash_forward.
// P = e^(scale·q·k − lse); dS = P·(dy·v − delta); dq = scale·Σ dS·k.
template <bool Hopper>
__device__ void flash_backward_q(const CUtensorMap* map, const CUtensorMap* dy_map, const floatX* dy, const floatX* qkv,
    const floatX* y, const float* lse, float2* statistics, floatX* dqkv, float* partial, int T, int NH) {
    int first = (gridDim.x - 1 - blockIdx.x) * FlashRows, warpgroup = uniform(threadIdx.x / 128);
    int own_first = first + warpgroup * TileRows;
    uint32_t queries = first_tile(), douts = queries + 2 * TileBytes;
    uint32_t own_queries = queries + warpgroup * TileBytes, own_douts = douts + warpgroup * TileBytes;
    Rows<Hopper> q(qkv, map, 3 * NH, blockIdx.y, T), k(qkv, map, 3 * NH, NH + blockIdx.y, T);
    Rows<Hopper> v(qkv, map, 3 * NH, 2 * NH + blockIdx.y, T), dout(dy, dy_map, NH, blockIdx.y, T);
    int end = (min(first + FlashRows, T) - 1) / TileRows + 1;
    Pairs<Hopper, false> pairs{k, v, nullptr, douts + 2 * TileBytes, 0, end};
    pairs.start(4 * TileBytes, [&](uint32_t barrier) {
        q.template load<FlashRows>(queries, first, barrier);
        dout.template load<FlashRows>(douts, first, barrier);
    });

    // Eight threads sum a row of dy·y.
    __shared__ float2 own_statistics[FlashRows];
    constexpr int RowsAtATime = FlashThreads / 8;
    float deltas[FlashRows / RowsAtATime];
#pragma unroll
    for (int i = 0; i < FlashRows / RowsAtATime; i++) {
        int row = min(first + i * RowsAtATime + (int)threadIdx.x / 8, T - 1);
        int64_t at = ((int64_t)(blockIdx.z * T + row) * NH + blockIdx.y) * HS + threadIdx.x % 8 * Width;
        deltas[i] = sum(load(y + at) * load(dy + at));
    }
    for (int i = 0; i < FlashRows / RowsAtATime; i++) {
        int own = i * RowsAtATime + threadIdx.x / 8, row = first + own;
        deltas[i] = sum_lanes<1, 2, 4>(deltas[i]);
        float2 both = {};
        if (row < T)
            both = make_float2(lse[((int64_t)blockIdx.z * NH + blockIdx.y) * T + row] * Log2E, deltas[i]);
        if (threadIdx.x % 8 == 0)
            own_statistics[own] = both;
        if (threadIdx.x % 8 == 0 && row < (T + TileRows - 1) / TileRows * TileRows)
            statistics_row(statistics, T, NH)[row] = both;
    }
    __syncthreads();
    const float2* of_warpgroup = own_statistics + warpgroup * TileRows;
    float2 own[2] = {of_warpgroup[row_of(0)], of_warpgroup[row_of(2)]};

    Fragments weights;
    Accumulators scores, products, sums = {};
    float scale = rsqrtf(HS);
    for (; pairs.tile < pairs.end; pairs.next()) {
        pairs.wait();
        if (pairs.tile * TileRows <= own_first) {
            uint32_t keys = pairs.tiles(), values = keys + TileBytes;
            multiply_transposed<Hopper>(scores, own_queries, keys);
            multiply_transposed<Hopper>(products, own_douts, values);
            pairs.refill(0);
            wgmma_wait<Hopper, 1>(scores);
            if (pairs.tile * TileRows == own_first)
                mask(scores, false);
            each([&](int j, int i) { scores[j][i] = exp2_approximate(scores[j][i] * (scale * Log2E) - own[i / 2].x); });
            wgmma_wait<Hopper, 0>(products);
            each([&](int j, int i) { scores[j][i] *= products[j][i] - own[i / 2].y; });
            to_fragments(weights, scores);
            multiply_add<Hopper>(sums, weights, keys);
            wgmma_wait<Hopper, 0>(sums);
        }
    }
    __syncthreads();
    store_rows<true>(sums, scale, scale, queries, dqkv, 3 * NH, blockIdx.y, first, T);
    __syncthreads();
    store_sums<FlashRows>(queries, partial + ((int64_t)(blockIdx.z * gridDim.x + blockIdx.x) * NH + blockIdx.y) * HS);
}

// dk and dv in dqkv (B, T, 3, NH, 64), and each block's sums of them in partial (B, blocks, 2, NH, 64), from dy
// (B, T, NH, 64), qkv (B, T, 3, NH, 64) and statistics. One block per 128 keys, or 192 with three warpgroups; it walks
// over the queries from its first key on. Rows are keys, columns are queries.
template <bool Hopper>
__device__ void flash_backward_kv(const CUtensorMap* map, const CUtensorMap* dy_map, const floatX* dy,
    const floatX* qkv, float2* statistics, floatX* dqkv, float* partial, int T, int NH) {
    constexpr int KeyRows = Hopper ? HopperKeyRows : FlashRows, KeyBytes = KeyRows * 128;
    int first = blockIdx.x * KeyRows, warpgroup = uniform(threadIdx.x / 128);
    int own_first = first + warpgroup * TileRows; // of this warpgroup's keys
    uint32_t keys = first_tile(), values = keys + KeyBytes;
    uint32_t own_keys = keys + warpgroup * TileBytes, own_values = values + warpgroup * TileBytes;
    Rows<Hopper> q(qkv, map, 3 * NH, blockIdx.y, T), k(qkv, map, 3 * NH, NH + blockIdx.y, T);
    Rows<Hopper> v(qkv, map, 3 * NH, 2 * NH + blockIdx.y, T), dout(dy, dy_map, NH, blockIdx.y, T);
    Pairs<Hopper, true> pairs{q, dout, statistics_row(statistics, T, NH), values + KeyBytes, first / TileRows,
        (T - 1) / TileRows + 1};
    pairs.start(2 * KeyBytes, [&](uint32_t barrier) {
        k.template load<KeyRows>(keys, first, barrier);
        v.template load<KeyRows>(values, first, barrier);
    });

    Fragments weights, product_weights;
    Accumulators scores, products, dk = {}, dv = {};
    float scale = rsqrtf(HS);
    for (; pairs.tile < pairs.end; pairs.next()) {
        pairs.wait();
        if (pairs.tile * TileRows >= own_first) {
            uint32_t queries = pairs.tiles(), douts = queries + TileBytes;
            const float4* columns = &at<const float4>(pairs.statistics(pairs.place));
            multiply_transposed<Hopper>(scores, own_keys, queries);
            multiply_transposed<Hopper>(products, own_values, douts);
            pairs.refill(first / TileRows);
            wgmma_wait<Hopper, 1>(scores);
            if (pairs.tile * TileRows == own_first)
                mask(scores, true);
            for (int j = 0; j < 8; j++) {
                float4 both = columns[column_of(j, 0) / 2];
                for (int i = 0; i < 4; i++)
                    scores[j][i] = exp2_approximate(scores[j][i] * (scale * Log2E) - (i % 2 ? both.z : both.x));
            }
            to_fragments(weights, scores);
            multiply_add<Hopper>(dv, weights, douts);
            wgmma_wait<Hopper, 1>(products);
            for (int j = 0; j < 8; j++) {
                float4 both = columns[column_of(j, 0) / 2];
                for (int i = 0; i < 4; i += 2) {
                    uint32_t p = weights[j / 2][j % 2 * 2 + i / 2]; // not scores, which frees their registers
                    products[j][i] = __uint_as_float(p << 16) * (products[j][i] - both.y);
                    products[j][i + 1] = __uint_as_float(p & 0xffff0000) * (products[j][i + 1] - both.w);
                }
            }
            to_fragments(product_weights, products);
            multiply_add<Hopper>(dk, product_weights, queries);
            wgmma_wait<Hopper, 0>(dk);
            wgmma_wait<Hopper, 0>(dv);
        }
    }
    __syncthreads();
    store_rows<true>(dk, scale, scale, keys, dqkv, 3 * NH, NH + blockIdx.y, first, T);
    store_rows<true>(dv, 1, 1, values, dqkv, 3 * NH, 2 * NH + blockIdx.y, first, T);
    __syncthreads();
    partial += ((int64_t)(blockIdx.z * gridDim.x + blockIdx.x) * 2 * NH + blockIdx.y) * HS;
    store_sums<KeyRows>(keys, partial);
    store_sums<KeyRows>(values, partial + NH * HS);
}

// Each kernel for any GPU and, in the code for Hopper (sm_90a), with wgmma and TMA. map and dy_map describe qkv and dy.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ON_HOPPER(...) __VA_ARGS__
#else
#define ON_HOPPER(...)
#endif
#define FLASH_KERNEL(name, blocks, threads, body, parameters, ...) \
    KERNEL __launch_bounds__(FlashThreads, blocks) name parameters { \
        body<false>(__VA_ARGS__); \
    } \
    ON_HOPPER(KERNEL __launch_bounds__(threads, blocks) name##_hopper parameters { \
        body<true>(__VA_ARGS__); \
    })

FLASH_KERNEL(attention, 2, FlashThreads, flash_forward,
    (MAP map, const floatX* qkv, floatX* y, float* lse, int T, int NH), &map, qkv, y, lse, T, NH)
FLASH_KERNEL(attention_backward_q, 2, FlashThreads, flash_backward_q,
    (MAP map, MAP dy_map, const floatX* dy, const floatX* qkv, const floatX* y, const float* lse, float2* statistics,
    floatX* dqkv, float* partial, int T, int NH),
    &map, &dy_map, dy, qkv, y, lse, statistics, dqkv, partial, T, NH)
FLASH_KERNEL(attention_backward_kv, 1, 2 * HopperKeyRows, flash_backward_kv,
    (MAP map, MAP dy_map, const floatX* dy, const floatX* qkv, float2* statistics, floatX* dqkv, float* partial, int T,
    int NH), &map, &dy_map, dy, qkv, statistics, dqkv, partial, T, NH)

// ---- Products for Hopper, each with an epilogue

#ifdef __CUDA_ARCH_FEAT_SM90_ALL
// c (M, N) = a·b + bias, where a is (M, K) and b is (N, K) or, if not transposed, (K, N). c is cut into tiles of 128 x
// 192. A cluster of two blocks takes the next two tiles, one below the other, when it is ready: none waits for blocks
// that start late because NCCL has their place. The two blocks share tiles of b. In each block, the last warp has TMA
// fill a ring of stages, each with a tile of a and of b; two warpgroups multiply 64 rows each and leave the result in
// shared memory; and six warps store it, 64 columns each, while the next tile is multiplied.
constexpr int ProductRows = 128, ProductColumns = 192, Depth = 64, Stages = 4, Chunks = ProductColumns / 64;
constexpr int WidestBand = 16; // of tiles
constexpr int StageBytes = (ProductRows + ProductColumns) * Depth * 2;
constexpr int Turns = 2 * Stages; // more than the loader can be ahead of the storers
constexpr int Multipliers = 8, Storers = 2 * Chunks, ProductThreads = (Multipliers + Storers + 1) * Warp; // warps

// True in one lane of the warp.
__device__ bool elect() {
    uint32_t elected;
    asm volatile("{\n.reg .pred p;\nelect.sync _|p, ~0;\nselp.b32 %0, 1, 0, p;\n}" : "=r"(elected));
    return elected;
}

// Products in bf16.
__device__ Eight operator*(Eight a, Eight b) {
    for (int i = 0; i < Width; i += 2)
        *(__nv_bfloat162*)(a.x + i) = __hmul2(*(__nv_bfloat162*)(a.x + i), *(__nv_bfloat162*)(b.x + i));
    return a;
}

typedef float ProductSums[ProductColumns / 8][4]; // (16, 192) of a warp, laid out like Accumulators

#define ALL_PRODUCT_ROWS ALL_ROWS, ROW(8), ROW(9), ROW(10), ROW(11), ROW(12), ROW(13), ROW(14), ROW(15), ROW(16), \
    ROW(17), ROW(18), ROW(19), ROW(20), ROW(21), ROW(22), ROW(23)

// c += a·b for 16 of the depth.
template <bool Transposed>
__device__ void wgmma(ProductSums& c, uint64_t a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 {" REGISTERS_32 ", "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "
        "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, %70, %71, "
        "%72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, "
        "%92, %93, %94, %95}, %96, %97, 1, 1, 1, 0, %98;"
        : ALL_PRODUCT_ROWS : "l"(a), "l"(b), "n"(Transposed ? 0 : 1));
}

__device__ void wgmma_wait(ProductSums& c) {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : ALL_PRODUCT_ROWS :: "memory");
}

__shared__ uint64_t barriers[2 * Stages + 4 + Turns];
__shared__ alignas(16) floatX biases[Turns][ProductColumns];
__shared__ int pairs[Turns]; // of tiles, which this cluster takes in its next turns
__device__ int pairs_taken; // by all clusters; 0 again when none is left for any cluster

// What the roles share: the arguments, and the walk over the cluster's pairs of tiles and the stages of the ring.
struct Tiles {
    const CUtensorMap *a, *b, *c, *residual; // (M, K), (N, K) or (K, N), (M, N), (M, N)
    const floatX* bias;                      // (N), or null
    floatX* gelu;                            // (M, N)
    const float* of_rows;                    // (M)
    float* partial;                          // (M/64, N) or (N/64, M)
    int M, N, K, V;

    int warp = uniform(threadIdx.x / Warp), lane = threadIdx.x % Warp;
    uint32_t rank = __clusterRelativeBlockRank(); // 0 for the upper tile of a pair, 1 for the lower
    int depths = (K + Depth - 1) / Depth;
    int down = (M + 2 * ProductRows - 1) / (2 * ProductRows), across = (N + ProductColumns - 1) / ProductColumns;
    int all = down * across, pair, row, column; // number of pairs, the current one, its tile's first row and column
    uint32_t stage = 0, phase = 0, turn = ~0u;  // turn counts this cluster's pairs
    uint32_t ring = first_tile(), results = ring + Stages * StageBytes;

    // A storing warp has a chunk of the tile, 64 x 64, and each thread eight columns of every fourth row.
    uint32_t place; // of the chunk, in shared memory
    int rows;       // left in c from the thread's first row on; 0 beyond column N
    int64_t at;     // index of the thread's first element in (M, N)

    Barriers full{shared_address(barriers)}, empty{full[Stages]}; // stages: loaded, and used
    Barriers filled{empty[Stages]}, free{filled[2]};              // warpgroups' results: there, and stored
    Barriers known{free[2]};                                      // turns' pairs: known

    __device__ void start() {
        if (threadIdx.x == 0) {
            for (int i = 0; i < Stages; i++) {
                mbarrier_init(full[i], 1);
                mbarrier_init(empty[i], 2 * Multipliers);
            }
            for (int i = 0; i < 2; i++) {
                mbarrier_init(filled[i], Multipliers / 2);
                mbarrier_init(free[i], Chunks);
            }
            for (int i = 0; i < Turns; i++)
                mbarrier_init(known[i], 1);
            mbarrier_init_fence();
        }
        __cluster_barrier_arrive();
        __cluster_barrier_wait();
    }

    __device__ void next_stage() {
        stage = (stage + 1) % Stages;
        phase ^= stage == 0;
    }

    __device__ bool next_pair() {
        turn++;
        mbarrier_wait(known[turn % Turns], turn / Turns);
        pair = pairs[turn % Turns];
        return pair < all;
    }

    // Goes row by row in bands, so narrow that their part of b stays in the L2.
    __device__ void go_to_tile() {
        int first = pair / (down * WidestBand) * WidestBand, within = pair % (down * WidestBand);
        int columns = min(WidestBand, across - first);
        row = (2 * (within / columns) + rank) * ProductRows;
        column = (first + within % columns) * ProductColumns;
    }

    __device__ Eight& chunk(int i) const { return ::at<Eight>(swizzled(place, 4 * i + lane / 8, lane % 8)); }
};

// An epilogue is what happens to a product. This one only stores c; the others override some of its steps.
struct Store {
    static constexpr bool HasResidual = false;

    // Steps of a multiplying warp: before a tile, of which it has rows from first on; and when it has x (2, 4), in the
    // layout of Accumulators, and is going to write it to shared memory.
    __device__ void begin(Tiles& tiles, int first) { }
    __device__ void change(float* x, uint32_t to) { }

    // Steps of a storing warp: when it knows its chunk; while that is multiplied; when it is there; when TMA stores it.
    __device__ void fetch(const Tiles& tiles) { }
    __device__ void prepare(const Tiles& tiles, uint32_t free) { }
    __device__ void change_chunk(const Tiles& tiles) { }
    __device__ void finish(const Tiles& tiles) { }
};

// c += residual (M, N), which TMA loads into the place of the result.
struct AddResidual : Store {
    static constexpr bool HasResidual = true;

    __device__ void prepare(const Tiles& tiles, uint32_t free) {
        if (elect()) {
            mbarrier_expect(free, TileBytes);
            load_box(tiles.place, tiles.residual, tiles.column, tiles.row, free);
            load_box(tiles.place + TileBytes / 2, tiles.residual, tiles.column, tiles.row + 32, free);
        }
    }

    __device__ void change(float* x, uint32_t to) {
        uint32_t there[4];
        ldmatrix(there, to);
        for (int i = 0; i < 8; i += 2) {
            x[i] += unpair(there[i / 2]).x;
            x[i + 1] += unpair(there[i / 2]).y;
        }
    }
};

// gelu (M, N) = GELU(c)
struct Gelu : Store {
    __device__ void finish(const Tiles& tiles) {
#pragma unroll 4
        for (int i = 0; i < 16; i++) {
            Eight x = tiles.chunk(i);
            store(x.x, map(load(x.x), gelu_of));
            if (4 * i < tiles.rows)
                __stcs((uint4*)(tiles.gelu + tiles.at + 4 * i * tiles.N), *(uint4*)&x);
        }
    }
};

// c *= GELU'(gelu (M, N)); partial (M/64, N) = the sums of c over 64 rows each.
struct GeluBackward : Store {
    Eight slopes[16]; // GELU's arguments, then its slopes, then the thread's part of c

    __device__ void fetch(const Tiles& tiles) {
        for (int i = 0; i < 16; i++)
            *(uint4*)&slopes[i] = 4 * i < tiles.rows ? __ldcs((uint4*)(tiles.gelu + tiles.at + 4 * i * tiles.N))
                : uint4{};
    }

    __device__ void prepare(const Tiles& tiles, uint32_t free) {
        for (int i = 0; i < 16; i++)
            store(slopes[i].x, map(load(slopes[i].x), gelu_slope_approximate));
    }

    __device__ void change_chunk(const Tiles& tiles) {
#pragma unroll
        for (int i = 0; i < 16; i++) {
            Eight& x = tiles.chunk(i);
            x = slopes[i] = x * slopes[i];
        }
        store_box_fence();
    }

    __device__ void finish(const Tiles& tiles) {
        Pack sums = {};
        for (int i = 0; i < 16; i++)
            sums = sums + load(slopes[i].x);
        sums = map(sums, sum_lanes<8, 16>);
        if (tiles.lane < 8 && tiles.rows > 0)
            store(tiles.partial + (int64_t)(tiles.row / 64) * tiles.N + tiles.column + tiles.lane * Width, sums);
    }
};

// c *= of_rows (M)
struct ScaleRows : Store {
    float of_row[2]; // of the thread's upper and lower row

    __device__ void begin(Tiles& tiles, int first) {
        tiles.go_to_tile();
        for (int i = 0; i < 2; i++)
            of_row[i] = tiles.of_rows[min(tiles.row + first + row_of(2 * i), tiles.M - 1)];
    }

    __device__ void change(float* x, uint32_t to) {
        for (int i = 0; i < 8; i++)
            x[i] *= of_row[i / 2 % 2];
    }
};

// For logits from 47 below their row's reference, where e underflows, to 117 above, where it is clamped to keep sums
// finite.
constexpr float ClassShift = 40, LargestClass = 112;

// Products of zeros take less power. So e is rounded, up or down at random with its mean kept, to a multiple of
// FewClasses/128 below FewClasses and to bf16 above: most of a row becomes 0. The random numbers come from an element's
// index and from the logits themselves.
constexpr float FewClasses = 0x1p-61f;

// c = e^(c − of_rows (M) − ClassShift), rounded, in the first V columns, else 0; partial (N/64, M) = the sums of 64
// columns each, before rounding.
struct Exponentials : ScaleRows {
    __device__ void change(float* x, uint32_t to) {
        for (int i = 0; i < 8; i++)
            x[i] -= of_row[i / 2 % 2];
    }

    __device__ void change_chunk(const Tiles& tiles) {
        uint32_t random = (uint32_t)tiles.at;
#pragma unroll 4
        for (int i = 0; i < 16; i++) {
            uint4& x = (uint4&)tiles.chunk(i);
            uint4 logits = x;
            Pack e = map(widen(logits), [](float x) {
                return exp2_approximate(fminf(x * Log2E - ClassShift * Log2E, LargestClass));
            });
            if (int inside = tiles.V - tiles.column - tiles.lane % 8 * Width; inside < Width)
                fill(e, inside, 0);
            float total = sum_lanes<1, 2, 4>(sum(e));
            if (4 * i < tiles.rows && tiles.lane % 8 == 0)
                tiles.partial[(int64_t)(tiles.column / 64) * tiles.M + tiles.row + 4 * i + tiles.lane / 8] = total;
            random = (random ^ logits.x) * 0x9e3779b9;
            random ^= random >> 15;
            uint32_t rounded[Width / 2];
            for (int j = 0; j < Width / 2; j++) {
                float low = e.x[2 * j] + FewClasses, high = e.x[2 * j + 1] + FewClasses;
                rounded[j] = pair_stochastically(low, high, random ^ j * 0x40004000);
                auto& both = (__nv_bfloat162&)rounded[j];
                both = __hsub2(both, __float2bfloat162_rn(FewClasses));
            }
            x = *(uint4*)rounded;
        }
        store_box_fence();
    }
};

// The last warp: fills the ring, takes pairs of tiles and tells both blocks of the cluster.
template <bool Transposed>
__device__ void load_tiles(Tiles& tiles) {
    int taken;
    auto take_pair = [&] {
        if (tiles.rank == 0)
            taken = atomicAdd(&pairs_taken, 1);
    };
    auto tell_pair = [&](uint32_t turn) {
        uint32_t barrier = tiles.known[turn % Turns];
        mbarrier_expect(barrier, sizeof(int));
        for (int i = 0; tiles.rank == 0 && i < 2; i++)
            send(taken, shared_address(pairs + turn % Turns), barrier, i);
        if (tiles.rank == 0 && taken == tiles.all + (int)gridDim.x / 2 - 1)
            pairs_taken = 0;
    };
    auto load_stage = [&](int k, uint32_t rows, uint32_t barrier) {
        int bytes = tiles.bias != nullptr && k == 0 ? min(ProductColumns, tiles.N - tiles.column) * 2 : 0;
        mbarrier_expect(barrier, StageBytes + bytes);
        if (bytes > 0)
            load_bytes(shared_address(biases[tiles.turn % Turns]), tiles.bias + tiles.column, bytes, barrier);
        for (int i = 0; i < ProductRows; i += 32)
            load_box(rows + i * 128, tiles.a, k * Depth, tiles.row + i, barrier);
        uint32_t columns = rows + ProductRows * 128;
        // Each block loads half of b's tile for both.
        for (int i = 0; i < ProductColumns / 2; i += 32) {
            int half = tiles.rank * (Transposed ? ProductColumns / 2 : Depth / 2);
            uint32_t to = columns + ((Transposed ? i : 2 * i) + half) * 128;
            int column = Transposed ? k * Depth : tiles.column + 2 * i;
            load_box_to_both(to, tiles.b, column, Transposed ? tiles.column + half + i : k * Depth + half, barrier);
        }
    };
    if (elect()) {
        take_pair();
        tell_pair(0);
    }
    while (tiles.next_pair()) {
        tiles.go_to_tile();
        for (int k = 0; k < tiles.depths; k++, tiles.next_stage()) {
            mbarrier_wait(tiles.empty[tiles.stage], tiles.phase ^ 1);
            if (elect()) {
                if (k == 0)
                    take_pair();
                load_stage(k, tiles.ring + tiles.stage * StageBytes, tiles.full[tiles.stage]);
                if (k == 0)
                    tell_pair(tiles.turn + 1);
            }
            __syncwarp();
        }
    }
}

// The first two warpgroups: multiply 64 rows each, and leave the result in shared memory.
template <bool Transposed, typename Epilogue>
__device__ void multiply_tiles(Tiles& tiles) {
    int warp = tiles.warp, warpgroup = warp / 4, lane = tiles.lane;
    while (tiles.next_pair()) {
        ProductSums sums = {};
        Epilogue epilogue;
        epilogue.begin(tiles, warpgroup * 64);
        if (Transposed && tiles.bias != nullptr) {
            mbarrier_wait(tiles.full[tiles.stage], tiles.phase); // the biases come with the first stage
            for (int j = 0; j < ProductColumns / 8; j++) {
                float2 both = unpair(*(const uint32_t*)(biases[tiles.turn % Turns] + j * 8 + lane % 4 * 2));
                sums[j][0] = sums[j][2] = both.x;
                sums[j][1] = sums[j][3] = both.y;
            }
        }
        for (int k = 0; k < tiles.depths; k++, tiles.next_stage()) {
            uint32_t rows = (tiles.ring & 0x3ffff) + tiles.stage * StageBytes, columns = rows + ProductRows * 128;
            mbarrier_wait(tiles.full[tiles.stage], tiles.phase);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < Depth / 16; i++) {
                uint64_t left = descriptor(rows + warpgroup * TileBytes, i * 32);
                uint64_t right = descriptor(columns, Transposed ? i * 32 : i * 16 * 128);
                if (!Transposed) // distance between 64 columns of b and the next
                    right += (uint64_t)((Depth * 128 >> 4) - 1) << 16;
                wgmma<Transposed>(sums, left, right);
            }
            wgmma_commit();
            wgmma_wait(sums);
            if (lane < 2)
                mbarrier_arrive_at(tiles.empty[tiles.stage], lane);
        }
        mbarrier_wait(tiles.free[warpgroup], Epilogue::HasResidual ? tiles.turn : tiles.turn + 1);
#pragma unroll
        for (int j = 0; j < ProductColumns / 8; j += 2) {
            uint32_t to = tiles.results + (warpgroup * Chunks + j / 8) * TileBytes, result[4];
            to = swizzled(to, warp % 4 * 16 + lane % 16, j % 8 + lane / 16);
            float* x = sums[j]; // and sums[j + 1]
            epilogue.change(x, to);
            for (int i = 0; i < 4; i++)
                result[i] = pair(x[2 * i], x[2 * i + 1]);
            stmatrix(to, result);
        }
        store_box_fence();
        __syncwarp();
        if (elect())
            mbarrier_arrive(tiles.filled[warpgroup]);
    }
}

// The other six warps: each stores a chunk of a warpgroup's result.
template <typename Epilogue>
__device__ void store_tiles(Tiles& tiles) {
    int warpgroup = (tiles.warp - Multipliers) / Chunks, part = (tiles.warp - Multipliers) % Chunks;
    uint32_t free = tiles.free[warpgroup], filled = tiles.filled[warpgroup];
    tiles.place = tiles.results + (tiles.warp - Multipliers) * TileBytes;
    Epilogue epilogue;
    auto next_chunk = [&] {
        tiles.next_pair();
        tiles.go_to_tile();
        tiles.row += warpgroup * 64;
        tiles.column += part * 64;
        tiles.rows = tiles.column + tiles.lane % 8 * Width < tiles.N ? tiles.M - tiles.row - tiles.lane / 8 : 0;
        tiles.at = (int64_t)(tiles.row + tiles.lane / 8) * tiles.N + tiles.column + tiles.lane % 8 * Width;
        epilogue.fetch(tiles);
    };
    for (next_chunk(); tiles.pair < tiles.all;) {
        epilogue.prepare(tiles, free);
        mbarrier_wait(filled, tiles.turn);
        epilogue.change_chunk(tiles);
        __syncwarp();
        if (elect()) {
            store_box(tiles.c, tiles.column, tiles.row, tiles.place);
            store_box(tiles.c, tiles.column, tiles.row + 32, tiles.place + TileBytes / 2);
            store_box_commit();
        }
        epilogue.finish(tiles);
        next_chunk();
        __syncwarp();
        if (elect()) {
            store_box_wait();
            if (!Epilogue::HasResidual)
                mbarrier_arrive(free);
        }
        __syncwarp();
    }
}

template <bool Transposed, typename Epilogue>
__device__ void multiply(Tiles tiles) {
    tiles.start();
    if (tiles.warp == Multipliers + Storers)
        load_tiles<Transposed>(tiles);
    else if (tiles.warp >= Multipliers)
        store_tiles<Epilogue>(tiles);
    else
        multiply_tiles<Transposed, Epilogue>(tiles);
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
}

#define PRODUCT_KERNEL(name, transposed, epilogue) \
    KERNEL __cluster_dims__(2) __launch_bounds__(ProductThreads, 1) name(MAP a, MAP b, MAP c, MAP residual, \
        const floatX* bias, floatX* gelu, const float* of_rows, float* partial, int M, int N, int K, int V) { \
        multiply<transposed, epilogue>({&a, &b, &c, &residual, bias, gelu, of_rows, partial, M, N, K, V}); \
    }

PRODUCT_KERNEL(linear, true, Store)
PRODUCT_KERNEL(linear_residual, true, AddResidual)
PRODUCT_KERNEL(linear_gelu, true, Gelu)
PRODUCT_KERNEL(linear_backward, false, Store)
PRODUCT_KERNEL(linear_gelu_backward, false, GeluBackward)
PRODUCT_KERNEL(linear_exponentials, true, Exponentials)
PRODUCT_KERNEL(linear_backward_scaled, false, ScaleRows)

// ---- Classifier for Hopper, as part of the products before and after it

// The softmax needs no pass of its own. The product with wte leaves e = e^(logit − reference − ClassShift), so the loss
// is ln Σ e + ClassShift + reference − target's logit: losses up to 115 do not overflow, and logits farther above the
// reference count as if they were there. dlogits is factor·e, less scale at the target, where factor = scale/Σ e is
// applied by the next products.

// of_rows (2, rows) = each row's reference and its distance from the target's logit, from x (rows, C), w (V, C) and
// targets (rows). A guess at ln Σ e^logit is a good reference, since it decides what is rounded to 0:
// ln(e^target's + V/4·e^mean), where mean is that of four words' logits. One warp per row.
KERNEL target_logits(const floatX* x, const floatX* w, const int* targets, float* of_rows, int rows, int C, int V) {
    constexpr int Words = 4;
    int64_t row = (int64_t)blockIdx.x * (blockDim.x / Warp) + threadIdx.x / Warp;
    if (row >= rows)
        return;
    float own = 0, others = 0;
    for (int c = threadIdx.x % Warp * Width; c < C; c += Warp * Width) {
        Pack a = load(x + row * C + c), words = {};
        for (int i = 0; i < Words; i++) // each block takes words of its own, all over the vocabulary
            words = words + load(w + (int64_t)((i * gridDim.x + blockIdx.x) * V / (Words * gridDim.x)) * C + c);
        own += sum(a * load(w + (int64_t)targets[row] * C + c));
        others += sum(a * words);
    }
    own = warp_sum(own);
    others = warp_sum(others) / Words;
    if (threadIdx.x % Warp == 0) {
        float distance = logf(1 + V / 4 * exp2_approximate(fminf((others - own) * Log2E, 60)));
        of_rows[row] = own + distance;
        of_rows[rows + row] = distance;
    }
}

// losses (rows); the first of of_rows (2, rows), as target_logits left it, = factor; scaled (rows, C) = x (rows, C) ·
// factor; e (rows, Vp) at the targets (rows) = itself, exactly, − Σ e. partial (chunks, rows) has the sums of e over 64
// columns each, which eight threads per row add up. One block per 32 rows.
KERNEL normalize_classes(const float* partial, int chunks, const int* targets, floatX* e, const floatX* x,
    floatX* scaled, float* of_rows, float* losses, float scale, int rows, int Vp, int C) {
    constexpr int Parts = 8;
    __shared__ float sums[Parts][Warp], factors[Warp];
    int part = threadIdx.x / Warp, lane = threadIdx.x % Warp, first = blockIdx.x * Warp, row = first + lane;
    float own = 0;
#pragma unroll 8
    for (int i = part; i < chunks; i += Parts)
        own += row < rows ? partial[(int64_t)i * rows + row] : 0;
    sums[part][lane] = own;
    __syncthreads();
    if (part == 0 && row < rows) {
        float total = 0;
        for (int i = 0; i < Parts; i++)
            total += sums[i][lane];
        float distance = of_rows[rows + row] + ClassShift; // of the target's logit from where e is 1
        losses[row] = logf(total) + distance;
        of_rows[row] = factors[lane] = scale / total;
        e[(int64_t)row * Vp + targets[row]] = exp2_approximate(-distance * Log2E) - total;
    }
    __syncthreads();
    for (int i = part; i < Warp && first + i < rows; i += Parts) {
        for (int c = lane * Width; c < C; c += Warp * Width) {
            int64_t at = (int64_t)(first + i) * C + c;
            store(scaled + at, map(load(x + at), [&](float x) { return x * factors[i]; }));
        }
    }
}
#endif
#endif

// ---- Classifier

constexpr int ClassifyThreads = 512;
constexpr float Lowest = -1e30f; // stands for −∞, which would lead to ∞ − ∞

// losses (rows) of logits (rows, Vp), of which V columns count, for targets (rows). Unless scale is 0, logits become
// scale times their gradients. One block per row, which stays in shared memory if it fits there (keeps).
KERNEL __launch_bounds__(ClassifyThreads) classify(floatX* logits, const int* targets, float* losses, float scale,
    int V, int Vp, int keeps) {
    __shared__ float maxima[ClassifyThreads / Warp], sums[ClassifyThreads / Warp];
    floatX *row = logits + (int64_t)blockIdx.x * Vp, *kept = keeps ? (floatX*)shared : row;
    int target = targets[blockIdx.x];
    float own_max = Lowest, own = 0, picked = row[target];
    for (int c = threadIdx.x * Width; keeps && c < V; c += ClassifyThreads * Width)
        cp_async(shared_address(kept + c), row + c, true);
    cp_async_commit();
    cp_async_wait(); // a thread reads only what it copied
    for (int c = threadIdx.x * Width; c < V; c += ClassifyThreads * Width) {
        Pack x = load(kept + c);
        if (c + Width > V)
            fill(x, V - c, Lowest);
        float new_max = own_max;
        for (int i = 0; i < Width; i++)
            new_max = fmaxf(new_max, x.x[i]);
        own *= exp2_approximate((own_max - new_max) * Log2E);
        for (int i = 0; i < Width; i++)
            own += exp2_approximate((x.x[i] - new_max) * Log2E);
        own_max = new_max;
    }
    float max = max_lanes<16, 8, 4, 2, 1>(own_max);
    own = warp_sum(own * exp2_approximate((own_max - max) * Log2E));
    if (threadIdx.x % Warp == 0) {
        maxima[threadIdx.x / Warp] = max;
        sums[threadIdx.x / Warp] = own;
    }
    __syncthreads();
    for (int i = 0; i < ClassifyThreads / Warp; i++)
        max = fmaxf(max, maxima[i]);
    float total = 0;
    for (int i = 0; i < ClassifyThreads / Warp; i++)
        total += sums[i] * exp2_approximate((maxima[i] - max) * Log2E);
    if (threadIdx.x == 0)
        losses[blockIdx.x] = logf(total) + max - picked;
    if (scale == 0)
        return;
    float factor = scale / total;
    for (int c = threadIdx.x * Width; c < Vp; c += ClassifyThreads * Width) {
        Pack x = c < V ? load(kept + c) : Pack{};
        for (int i = 0; i < Width; i++)
            x.x[i] = exp2_approximate((x.x[i] - max) * Log2E) * factor;
        if (c + Width > V)
            fill(x, V - c, 0);
        store(row + c, x);
    }
    if (target / Width % ClassifyThreads == threadIdx.x)
        row[target] = exp2_approximate((picked - max) * Log2E) * factor - scale;
}

// ---- Optimizer

constexpr int NormThreads = 256;

// partial (blocks) = each block's part of Σ x² over x (count).
KERNEL __launch_bounds__(NormThreads) sum_of_squares(const float* x, int64_t count, double* partial) {
    __shared__ double sums[NormThreads];
    int64_t thread = (int64_t)blockIdx.x * NormThreads + threadIdx.x, threads = (int64_t)gridDim.x * NormThreads;
    double own = 0;
    for (int64_t i = thread * Width; i + Width <= count; i += threads * Width) {
        Pack value = load(x + i);
        own += sum(value * value);
    }
    if (int64_t i = count / Width * Width + thread; i < count)
        own += x[i] * x[i];
    sums[threadIdx.x] = own;
    for (int half = NormThreads / 2; half > 0; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half)
            sums[threadIdx.x] += sums[threadIdx.x + half];
    }
    if (threadIdx.x == 0)
        partial[blockIdx.x] = sums[0];
}

// Part of a tensor: w, master, dw, m and v (count). first is its index among all parameters; decays is 0 or 1.
struct AdamWPart {
    int64_t first, count, decays;
    floatX* w;
    float *master, *dw, *m, *v;
};

// 32 random bits for each counter and seed: the finalizer of MurmurHash3, twice.
__device__ uint32_t random_bits(uint32_t counter, uint32_t seed) {
    uint32_t x = counter;
    for (int round = 0; round < 2; round++) {
        x = (x ^ seed) * 0x9e3779b9;
        x = (x ^ x >> 16) * 0x85ebca6b;
        x = (x ^ x >> 13) * 0xc2b2ae35;
        x ^= x >> 16;
    }
    return x;
}

// Eight elements, or the first count. They need no alignment, for a rank's part may begin anywhere in a tensor.
template <typename T>
__device__ bool are_whole(const T* at, int64_t count) { return count >= Width && (uintptr_t)at % 16 == 0; }

template <typename T>
__device__ Pack load_some(const T* from, int64_t count) {
    if (are_whole(from, count))
        return load(from);
    Pack pack = {};
    for (int i = 0; i < Width; i++) {
        if (i < count)
            pack.x[i] = from[i];
    }
    return pack;
}

template <typename T>
__device__ void store_some(T* to, int64_t count, Pack pack) {
    if (are_whole(to, count))
        return store(to, pack);
    for (int i = 0; i < Width; i++) {
        if (i < count)
            to[i] = pack.x[i];
    }
}

// Stores eight weights, or the first count, in master and, rounded, in w. first is the index of the first of them.
__device__ void store_weights(float* master, floatX* w, int64_t count, Pack x, int64_t first, uint32_t seed) {
    store_some(master, count, x);
#ifndef FP32
    for (int j = 0; j < Width; j += 2) {
        uint64_t counter = (first + j) / 2;
        uint32_t random = random_bits((uint32_t)counter, seed + (uint32_t)(counter >> 32));
        x.x[j] = round_stochastically(x.x[j], random);
        x.x[j + 1] = round_stochastically(x.x[j + 1], random >> 16);
    }
    store_some(w, count, x);
#endif
}

// Updates all parts, one per y, and clears dw.
KERNEL adamw(const AdamWPart* parts, float learning_rate, float weight_decay, float gradient_scale, float beta1,
    float beta2, float epsilon, float correction1, float correction2, uint32_t seed) {
    AdamWPart part = parts[blockIdx.y];
    float decay = part.decays ? learning_rate * weight_decay : 0;
    int64_t stride = (int64_t)gridDim.x * blockDim.x * Width;
    for (int64_t i = ((int64_t)blockIdx.x * blockDim.x + threadIdx.x) * Width; i < part.count; i += stride) {
        Pack dw = load(part.dw + i), m = load(part.m + i), v = load(part.v + i);
        Pack w = load_some(part.master + i, part.count - i);
        for (int j = 0; j < Width; j++) {
            float g = dw.x[j] * gradient_scale;
            m.x[j] = beta1 * m.x[j] + (1 - beta1) * g;
            v.x[j] = beta2 * v.x[j] + (1 - beta2) * g * g;
            float change = learning_rate * correction1 * m.x[j] / (sqrtf(v.x[j] * correction2) + epsilon);
            w.x[j] = w.x[j] * (1 - decay) - change;
        }
        store(part.dw + i, Pack{});
        store(part.m + i, m);
        store(part.v + i, v);
        store_weights(part.master + i, part.w + i, part.count - i, w, part.first + i, seed);
    }
}

constexpr int MuonThreads = 256;

// m = lerp(m, g, 1 − momentum), x = lerp(g, m, momentum) and dw = 0, with g = dw·scale; all (matrices, size), one of
// the matrices per y. partial (matrices, blocks) = each block's part of Σ x².
KERNEL __launch_bounds__(MuonThreads) muon_momentum(
    float* dw, float* m, floatX* x, float* partial, int size, float scale, float momentum) {
    __shared__ alignas(16) float sums[MuonThreads / Warp];
    int within = (blockIdx.x * MuonThreads + threadIdx.x) * Width;
    int64_t i = (int64_t)blockIdx.y * size + within;
    Pack u = {};
    if (within < size) {
        u = load(dw + i);
        Pack mean = load(m + i);
        for (int j = 0; j < Width; j++) {
            float g = u.x[j] * scale;
            mean.x[j] = momentum * mean.x[j] + (1 - momentum) * g;
            u.x[j] = momentum * mean.x[j] + (1 - momentum) * g;
        }
        store(m + i, mean);
        store(x + i, u);
        store(dw + i, Pack{}); // last, when the load from there is done
    }
    sums[threadIdx.x / Warp] = warp_sum(sum(u * u));
    __syncthreads();
    if (threadIdx.x == 0)
        partial[blockIdx.y * gridDim.x + blockIdx.x] = sum(load(sums));
}

// Divides each matrix of x (matrices, size) by its norm, or at least 1e-7. partial (matrices, parts) has the parts of
// its Σ x².
KERNEL muon_normalize(floatX* x, const float* partial, int parts, int size) {
    int64_t matrix = (int64_t)blockIdx.y * size;
    int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
    float squares = 0;
    for (int i = threadIdx.x % Warp; i < parts; i += Warp)
        squares += partial[blockIdx.y * parts + i];
    float factor = 1 / fmaxf(sqrtf(warp_sum(squares)), 1e-7f);
    for (int64_t i = matrix + thread * Width; i < matrix + size; i += threads * Width)
        store(x + i, map(load(x + i), [=](float u) { return u * factor; }));
}

// master = master·keep − rate·x and, rounded, w; all (count). first is as in AdamWPart.
KERNEL muon(
    const floatX* x, float* master, floatX* w, int count, int64_t first, float keep, float rate, uint32_t seed) {
    int i = (blockIdx.x * blockDim.x + threadIdx.x) * Width;
    if (i < count) {
        Pack kept = map(load(master + i), [=](float w) { return w * keep; });
        Pack change = map(load(x + i), [=](float u) { return -rate * u; });
        store_weights(master + i, w + i, Width, kept + change, first + i, seed);
    }
}

// ---- Generation

// One launch makes the next tokens of up to 64 sequences, whose activations are the rows of x. Its blocks run a program
// of operations. Products of so few rows take as long as their weights take to come, so in each block one warp asks for
// these well ahead, across operations, and eight warps work.
//
// With few rows, the results of an operation go to the next one by mail: in words of 16 bytes, which hold four channels
// and the time of writing. A reader looks at a word until it has the right time; nobody waits for anything else. With
// many rows that would double the traffic, so there all blocks wait for one another after each operation.

constexpr int DecodeWarps = 8, DecodeThreads = DecodeWarps * Warp; // that work
constexpr int FewRows = 8, MostRows = 64;
constexpr int Channels = 8; // columns of a product that a block computes at a time
constexpr int Pieces = 3, Slice = DecodeWarps * Pieces * 4 * Width; // of its depth, multiplied at a time
constexpr int ScratchBytes = DecodeThreads * 4 * DecodeWarps * 4, MostCandidates = ScratchBytes / 20;
constexpr int PartKeys = 128; // keys that a block attends to at a time

enum Kind { EmbedNext, LinearNext, GeluNext, ResidualNext, LogitsNext, AttentionNext, ChooseNext };

// y (rows, T, N), of which the row at the position is written, from x (rows, K). An embedding has wte for x and wpe for
// b, attention x (rows, T, 3K), and a choice logits (rows, K) in fp32. Blocks get tiles of eight columns in turn, and
// each operation goes on where the one before it ended, so that all get as many in the end.
struct Operation {
    int kind, N, K, T, heads, turn;
    const floatX *x, *norm_w, *norm_b, *b, *w; // norm_w and norm_b (K), or null; b (N), or null; w (N, K), or null
    void* y;

    // This block's first tile; the next ones are gridDim.x further on.
    __device__ int first_tile() const {
        return blockIdx.x + turn < gridDim.x ? blockIdx.x + turn : blockIdx.x + turn - gridDim.x;
    }
};

struct Decode {
    const Operation* program;
    int* tokens;        // (count + 1, rows), of which the first are known
    float* maxima;      // (rows, tiles): the largest of every eight logits
    float2* sums;       // (rows, tiles): the sum of every eight channels of the residual stream, and of their squares
    floatX* normed;     // (rows, C), the residual stream normalized, where it is not in the mail
    uint32_t* arrivals; // 0 at first
    uint4* mail;        // a box of box_words words for the results of each kind, then one for the parts of attention
    int box_words, slots, length, rows, position, shared, count, drawn, first, top_k, selects;
    float temperature, top_p;
    uint32_t seed, time; // the time before the first operation
};

PTX(sync_workers, (), "bar.sync 1, %0;" ::"n"(DecodeThreads) : "memory")
PTX(count_workers, (uint32_t& count, bool counts), "{\n.reg .pred counts;\nsetp.ne.u32 counts, %1, 0;\n"
    "bar.red.popc.u32 %0, 1, %2, counts;\n}" : "=r"(count) : "r"((uint32_t)counts), "n"(DecodeThreads) : "memory")
// As cp_async, and the first for the L2 to evict.
PTX(cp_async_once, (uint32_t to, const void* from, bool inside, uint64_t policy),
    "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;"
    ::"r"(to), "l"(from), "r"(inside ? 16 : 0), "l"(policy))
PTX(evict_first, (uint64_t& policy), "createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy))
PTX(cp_async_arrive, (uint32_t barrier), "cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(barrier) : "memory")
PTX(arrive, (uint32_t* counter), "red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory")
PTX(load_relaxed, (uint32_t& to, const uint32_t* from), "ld.relaxed.gpu.global.u32 %0, [%1];"
    : "=r"(to) : "l"(from) : "memory")
PTX(fence, (), "fence.acq_rel.gpu;" ::: "memory")

// Writes and reads 16 bytes, which nobody sees half-written.
PTX(store_word, (uint4* to, uint4 x), "{\n.reg .b64 low, high;\n.reg .b128 word;\nmov.b64 low, {%1, %2};\n"
    "mov.b64 high, {%3, %4};\nmov.b128 word, {low, high};\nst.relaxed.gpu.global.b128 [%0], word;\n}"
    ::"l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory")
PTX(load_word, (uint4& x, const uint4* from), "{\n.reg .b64 low, high;\n.reg .b128 word;\n"
    "ld.relaxed.gpu.global.b128 word, [%4];\nmov.b128 {low, high}, word;\nmov.b64 {%0, %1}, low;\n"
    "mov.b64 {%2, %3}, high;\n}" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "l"(from))

// Waits, unless told otherwise, until all blocks have come here, for the time-th time.
__device__ void meet(uint32_t* arrivals, uint32_t time, bool waits = true) {
    sync_workers();
    if (threadIdx.x == 0) {
        arrive(arrivals);
        for (uint32_t seen = 0; waits && (int)(seen - time * gridDim.x) < 0;)
            load_relaxed(seen, arrivals);
        fence();
    }
    sync_workers();
}

// An array (rows, columns) in the mail. A word has four channels; of the residual stream, a word with an even index has
// the sum of its channels and the next word's, and the next word that of their squares.
struct Mail {
    uint4* words;
    uint32_t time;

    __device__ void send(int place, uint2 channels, float more = 0) const {
        store_word(words + place / 4, make_uint4(channels.x, channels.y, __float_as_uint(more), time));
    }

    // The words that at(i) points to, for i < count, once all are there.
    template <int Most, typename At>
    __device__ void receive(uint4 (&some)[Most], int count, At at) const {
#pragma unroll
        for (int i = 0; i < Most; i++)
            some[i].w = time;
        for (bool missing = true; missing;) {
            missing = false;
#pragma unroll
            for (int i = 0; i < Most; i++) {
                if (i < count)
                    load_word(some[i], at(i));
            }
#pragma unroll
            for (int i = 0; i < Most; i++)
                missing |= some[i].w != time;
        }
    }
};

// Where the results of an operation go.
__device__ Mail box_of(const Decode& run, int kind, uint32_t time) {
    return {run.mail + (kind == ResidualNext ? EmbedNext : kind) * run.box_words, time};
}

// The weights of all products in the order of their use: of each tile of 8 rows that the block has, each slice of 768
// columns. They wait in a ring in shared memory, in slots that begin with two barriers, filled and emptied.
struct Weights {
    static constexpr int RowBytes = Slice * sizeof(floatX) + 64; // 64 more, so that no banks conflict
    static constexpr int Filled = 0, Emptied = 8, Rows = 16, SlotBytes = Rows + Channels * RowBytes;
    uint32_t first, end, slot, read; // addresses, the last in a slot
    int phase = 0;

    __device__ Weights(int slots) : first(shared_address(shared)), end(first + slots * SlotBytes), slot(first) {
        int lane = threadIdx.x % Warp;
        read = Rows + lane / 4 * RowBytes + (part() + lane % 4 * Width) * sizeof(floatX);
        for (uint32_t at = first; at < end && threadIdx.x == 0; at += SlotBytes) {
            mbarrier_init(at + Filled, Warp);
            mbarrier_init(at + Emptied, DecodeWarps);
        }
    }

    // The first column of a slice that is this warp's.
    static __device__ int part() { return threadIdx.x / Warp * Pieces * 4 * Width; }

    __device__ void next() {
        slot += SlotBytes;
        if (slot == end) {
            slot = first;
            phase ^= 1;
        }
    }

    // Copies all weights, as often as the program runs. Rows beyond the last are some other weights.
    __device__ void copy(const Operation* program, int length, int count) {
        constexpr int Part = 16 / sizeof(floatX), Parts = Slice / (Warp * Part); // of a row
        uint64_t policy;
        evict_first(policy);
        int lane = threadIdx.x % Warp;
        for (int i = 0; i < count * length; i++) {
            const Operation& op = program[i % length];
            int K = op.K, N = op.w ? op.N : 0;
            for (int tile = op.first_tile(); tile * Channels < N; tile += gridDim.x) {
                const floatX* from = op.w + (int64_t)tile * Channels * K;
                for (int column = lane * Part; column < K + lane * Part; column += Slice) {
                    mbarrier_wait(slot + Emptied, phase ^ 1);
#pragma unroll
                    for (int row = 0; row < Channels; row++) {
#pragma unroll
                        for (int part = 0; part < Parts; part++) {
                            int at = column + part * Warp * Part;
                            cp_async_once(slot + Rows + row * RowBytes + (part * Warp + lane) * 16, from + row * K + at,
                                at < K, policy);
                        }
                    }
                    cp_async_arrive(slot + Filled);
                    next();
                }
            }
        }
        cp_async_wait();
    }

    // Of row lane/4 columns lane%4·8 to ·8 + 7 of this warp's, and those 32 and 64 further on.
    __device__ void take(Raw (&w)[Pieces]) {
        mbarrier_wait(slot + Filled, phase);
#pragma unroll
        for (int i = 0; i < Pieces; i++)
            w[i] = at<Raw>(slot + read + i * 4 * (int)sizeof(Eight));
        __syncwarp();
        if (threadIdx.x % Warp == 0)
            mbarrier_arrive(slot + Emptied);
        next();
    }
};

// Four elements, and what they are in memory, which is asked for early and widened late.
struct alignas(16) Four {
    float x[4];
};
__device__ uint2 narrow(Four y) { return {pair(y.x[0], y.x[1]), pair(y.x[2], y.x[3])}; }
#ifdef FP32
typedef Four RawFour;
__device__ Four widen(RawFour x) { return x; }
__device__ void load_raw(RawFour& to, const float* from) { to = *(const Four*)from; }
__device__ void store_four(float* to, Four y) { *(Four*)to = y; }
#else
typedef uint2 RawFour;
__device__ Four widen(RawFour x) {
    float2 low = unpair(x.x), high = unpair(x.y);
    return {low.x, low.y, high.x, high.y};
}
PTX(load_raw, (RawFour& to, const floatX* from), "ld.global.v2.b32 {%0, %1}, [%2];" // volatile, so not put off
    : "=r"(to.x), "=r"(to.y) : "l"(from))
__device__ void store_four(__nv_bfloat16* to, Four y) { *(uint2*)to = narrow(y); }
#endif

// The seed of the random numbers for one token of a sample, and Gumbel's distribution: the largest of logit + gumbel is
// a token drawn from the softmax.
__device__ uint32_t seed_of(const Decode& run, int row, int n) {
    return random_bits(run.drawn + n, random_bits(run.first + row, run.seed));
}
__device__ float gumbel(int token, uint32_t seed) {
    return -logf(-logf(((random_bits(token, seed) >> 9) + 0.5f) * 0x1p-23f));
}

// Mean and 1/deviation of a row of the residual stream. Words of the mail have sums of channels and of squares in turn;
// a thread puts the sum of its own words, which are all of one sort, into sums (warps).
__device__ void put_sums(float own, float2* sums) {
    own = sum_lanes<16, 8, 4, 2>(own);
    if (threadIdx.x % Warp < 2)
        ((float*)(sums + threadIdx.x / Warp))[threadIdx.x % Warp] = own;
}
__device__ float2 statistics_of(const float2* sums, float inverse) { // of C
    float total = 0, squares = 0;
#pragma unroll
    for (int i = 0; i < DecodeWarps; i++) {
        total += sums[i].x;
        squares += sums[i].y;
    }
    float mean = total * inverse;
    return {mean, rsqrtf(fmaxf(squares * inverse - mean * mean, 0) + 1e-5f)};
}

// Four channels of layer norm.
__device__ Four normalize(Four x, float2 s, Four w, Four b) {
    for (int i = 0; i < 4; i++)
        x.x[i] = (x.x[i] - s.x) * s.y * w.x[i] + b.x[i];
    return x;
}

// normed (rows, C) = layer norm of the residual stream x (rows, C), one row per block.
__device__ void normalize_rows(const Operation& op, const Decode& run, float2* sums) {
    int C = op.K;
    for (int row = blockIdx.x; row < run.rows; row += gridDim.x) {
        const float* of_row = (const float*)(run.sums + row * (C / Width));
        float own = 0;
        for (int word = threadIdx.x; word < C / 4; word += DecodeThreads)
            own += of_row[word];
        put_sums(own, sums);
        sync_workers();
        float2 s = statistics_of(sums, 1.f / C);
        for (int c = threadIdx.x * 4; c < C; c += DecodeThreads * 4) {
            RawFour x, w, b;
            load_raw(x, op.x + row * C + c);
            load_raw(w, op.norm_w + c);
            load_raw(b, op.norm_b + c);
            store_four(run.normed + row * C + c, normalize(widen(x), s, widen(w), widen(b)));
        }
        sync_workers();
    }
}

// One product: y = x·wᵀ + b, with the rows of x normalized first if there are weights for that. Each warp multiplies
// its part of the depth, for a group of tiles, whose sums go to scratch; then each thread adds up all warps' sums for
// four results. There is mail for few rows.
template <bool Mails>
struct Product {
    static constexpr int Rows = Mails ? FewRows : MostRows, Eights = Rows / 8, Group = DecodeThreads / (2 * Rows);
    const Operation& op;
    const Decode& run;
    int n, warp, lane, N, K, pieces;
    Mail in, stream, out;
    Weights& weights;
    float* scratch;     // (group, warps, Rows, 8)
    floatX* staged;     // x (rows, K), normalized, in shared memory
    const floatX* from; // the same in memory, if there is no mail

    // The first of the eight columns that this lane has of a piece.
    __device__ int column(int piece) const {
        return Weights::part() + lane % 4 * Width + piece / Pieces * Slice + piece % Pieces * 4 * Width;
    }

    // Where a row of y is.
    __device__ int64_t place(int row, int column) const {
        return ((int64_t)row * op.T + (op.T > 1 ? run.position + n : 0)) * N + column;
    }

    // Four results of a row, and what is added to them: a bias, and what was there.
    struct Quad {
        int tile, row, column;
        bool inside;
        RawFour bias;
        uint4 old; // the first words of which are a RawFour
    };

    // The results of a group of tiles that are this thread's.
    __device__ Quad results(int first) {
        Quad y = {first + (int)(threadIdx.x / (2 * Rows) * gridDim.x), (int)threadIdx.x % (2 * Rows) / 2};
        y.column = y.tile * Channels + threadIdx.x % 2 * 4;
        y.inside = y.row < run.rows && y.column < N;
        if (y.inside && op.b)
            load_raw(y.bias, op.b + y.column);
        if (y.inside && op.kind == ResidualNext) {
            if constexpr (Mails)
                load_word(y.old, stream.words + (y.row * N + y.column) / 4);
            else
                load_raw((RawFour&)y.old, (floatX*)op.y + place(y.row, y.column));
        }
        return y;
    }

    __device__ void finish(Quad y) {
        float* part = scratch + threadIdx.x / (2 * Rows) * DecodeWarps * Rows * Channels + threadIdx.x % (2 * Rows) * 4;
        Four x = {};
#pragma unroll
        for (int i = 0; i < DecodeWarps; i++) {
            float4 more = *(const float4*)(part + i * Rows * Channels);
            x = {x.x[0] + more.x, x.x[1] + more.y, x.x[2] + more.z, x.x[3] + more.w};
        }
        if (op.kind == LogitsNext)
            return finish_logits(y, x);
        Four bias = widen(y.bias);
        if constexpr (Mails) {
            if (op.kind == ResidualNext && y.inside && y.old.w != stream.time) {
                uint4 word[1];
                stream.receive(word, 1, [&](int) { return stream.words + (y.row * N + y.column) / 4; });
                y.old = word[0];
            }
        }
        Four old = widen((RawFour&)y.old);
        for (int i = 0; i < 4; i++) {
            x.x[i] += op.kind == ResidualNext ? bias.x[i] + old.x[i] : bias.x[i];
            x.x[i] = (float)(floatX)(op.kind == GeluNext ? gelu_of(x.x[i]) : x.x[i]);
        }
        float total = sum_lanes<1>((x.x[0] + x.x[1]) + (x.x[2] + x.x[3]));
        float squares = sum_lanes<1>((x.x[0] * x.x[0] + x.x[1] * x.x[1]) + (x.x[2] * x.x[2] + x.x[3] * x.x[3]));
        if (!y.inside)
            return;
        if constexpr (Mails) {
            out.send(y.row * N + y.column, narrow(x), threadIdx.x % 2 ? squares : total);
        } else {
            store_four((floatX*)op.y + place(y.row, y.column), x);
            if (op.kind == ResidualNext && threadIdx.x % 2 == 0)
                run.sums[y.row * (N / Channels) + y.tile] = make_float2(total, squares);
        }
    }

    __device__ void finish_logits(Quad y, Four x) {
        float max = -INFINITY;
        bool draws = !run.selects && run.temperature > 0;
        for (int i = 0; i < 4; i++) {
            float logit = x.x[i];
            if (draws)
                logit = logit / run.temperature + gumbel(y.column + i, seed_of(run, y.row, n));
            logit = logit == logit ? logit : INFINITY; // which no maximum ignores
            if (y.inside && y.column + i < N) {
                ((float*)op.y)[(int64_t)y.row * N + y.column + i] = logit;
                max = fmaxf(max, logit);
            }
        }
        max = max_lanes<1>(max);
        if (y.inside && threadIdx.x % 2 == 0)
            run.maxima[y.row * ((N + Channels - 1) / Channels) + y.tile] = max;
    }

#ifdef FP32
    __device__ void prepare() {}

    __device__ void multiply(bool, float* partial) {
        float sums[Rows] = {};
        for (int first = 0; first < pieces; first += Pieces) {
            Raw w[Pieces];
            weights.take(w);
            for (int piece = 0; piece < Pieces; piece++) {
                int c = column(first + piece);
                for (int row = 0; row < run.rows && c < K; row++) {
                    Raw x = load(from + row * K + c);
#pragma unroll
                    for (int i = 0; i < Rows; i++)
                        sums[i] += i == row ? sum(x * w[piece]) : 0;
                }
            }
        }
#pragma unroll
        for (int row = 0; row < Rows; row++) {
            float total = sum_lanes<2, 1>(sums[row]);
            if (lane % 4 == 0)
                partial[(warp * Rows + row) * Channels + lane / 4] = total;
        }
    }
#else
    Raw x[Pieces][Eights]; // of a slice, in the order in which mma takes them

    // Puts a word of x (rows, K / 4) into shared memory. Of eight channels, pairs 0 and 2, then 1 and 3 lie together.
    __device__ void stage_word(uint32_t word, uint32_t low, uint32_t high) const {
        uint32_t* at = (uint32_t*)staged + (word & ~1u) * 2 + (word & 1);
        at[0] = low;
        at[2] = high;
    }

    // Takes x out of the mail.
    __device__ void stage() {
        constexpr int Most = 4; // words of a thread at a time
        int words = run.rows * K / 4;
        for (int first = 0; first < words; first += Most * DecodeThreads) {
            uint4 some[Most] = {};
            auto word = [&](int i) { return first + i * DecodeThreads + (int)threadIdx.x; };
            in.receive(some, (words - first + DecodeThreads - 1) / DecodeThreads,
                [&](int i) { return in.words + min(word(i), words - 1); });
#pragma unroll
            for (int i = 0; i < Most; i++) {
                if (word(i) < words)
                    stage_word(word(i), some[i].x, some[i].y);
            }
        }
        sync_workers();
    }

    // Takes the residual stream out of the mail, and normalizes it. A thread has a word of each row, or two of fewer.
    __device__ void stage_normalized() {
        constexpr int Most = FewRows;
        int words = K / 4, own = words > DecodeThreads ? 2 : 1; // of a row
        float inverse = 1.f / K;
        float2* sums = (float2*)scratch; // (rows, warps)
        RawFour w[2] = {}, b[2] = {};
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int c = (threadIdx.x + i * DecodeThreads) * 4;
            if (c < K) {
                load_raw(w[i], op.norm_w + c);
                load_raw(b[i], op.norm_b + c);
            }
        }
        auto row = [&](int i) { return own == 1 ? i : i / 2; };
        auto word = [&](int i) { return (int)threadIdx.x + (own == 1 ? 0 : i % 2 * DecodeThreads); };
        uint4 some[Most] = {};
        in.receive(some, run.rows * own,
            [&](int i) { return in.words + row(i) * words + min(word(i), words - 1); });
        float sum = 0;
#pragma unroll
        for (int i = 0; i < Most; i++) {
            if (i >= run.rows * own)
                break;
            sum += word(i) < words ? __uint_as_float(some[i].z) : 0;
            if (own == 1 || i % 2) {
                put_sums(sum, sums + row(i) * DecodeWarps);
                sum = 0;
            }
        }
        sync_workers();
#pragma unroll
        for (int i = 0; i < Most; i++) {
            if (i >= run.rows * own)
                break;
            bool second = own == 2 && i % 2;
            float2 s = statistics_of(sums + row(i) * DecodeWarps, inverse);
            uint2 y = narrow(normalize(widen(RawFour{some[i].x, some[i].y}), s, widen(second ? w[1] : w[0]),
                widen(second ? b[1] : b[0])));
            if (word(i) < words)
                stage_word(row(i) * words + word(i), y.x, y.y);
        }
        sync_workers();
    }

    // x = a slice of x.
    __device__ void fetch(int first) {
#pragma unroll
        for (int i = 0; i < Pieces; i++) {
            int c = column(first + i);
#pragma unroll
            for (int j = 0; j < Eights; j++) {
                int row = j * 8 + lane / 4;
                x[i][j] = {};
                if (c < K && (Mails || row < run.rows))
                    x[i][j] = *(const Raw*)((Mails ? staged : from) + min(row, run.rows - 1) * K + c);
            }
        }
    }

    __device__ void prepare() {
        if constexpr (Mails) {
            if (op.norm_w)
                stage_normalized();
            else
                stage();
        }
        if (pieces == Pieces)
            fetch(0);
    }

    __device__ void multiply(bool is_first, float* partial) {
        float sums[2][(Eights + 1) / 2][4] = {}; // two, so that fewer products wait for the one before
        for (int first = 0; first < pieces; first += Pieces) {
            if (pieces > Pieces)
                fetch(first);
            Raw w[Pieces];
            weights.take(w);
#pragma unroll
            for (int i = 0; i < Pieces; i++) {
                if constexpr (Mails) {
                    Raw a = x[i][0];
                    mma(sums[0][0], {a.x, a.y, a.z, a.w}, w[i].x, w[i].y); // of which the upper eight rows count
                    mma(sums[1][0], {a.x, a.y, a.z, a.w}, w[i].z, w[i].w); // of which the lower eight count
                } else {
#pragma unroll
                    for (int j = 0; j < Eights; j += 2) {
                        Raw low = x[i][j], high = x[i][j + 1];
                        mma(sums[0][j / 2], {low.x, high.x, low.y, high.y}, w[i].x, w[i].y);
                        mma(sums[1][j / 2], {low.z, high.z, low.w, high.w}, w[i].z, w[i].w);
                    }
                }
            }
        }
#pragma unroll
        for (int j = 0; j < Eights; j++) {
            float *even = &sums[0][j / 2][j % 2 * 2], *odd = &sums[1][j / 2][Mails ? 2 : j % 2 * 2];
            *(float2*)&partial[(warp * Rows + j * 8 + lane / 4) * Channels + lane % 4 * 2] =
                make_float2(even[0] + odd[0], even[1] + odd[1]);
        }
    }
#endif

    __device__ void compute() {
        int own_first = op.first_tile();
        if (own_first * Channels >= N)
            return;
        Quad y = results(own_first);
        prepare();
        for (int first = own_first;;) {
            for (int tile = first, i = 0; i < Group && tile * Channels < N; i++, tile += gridDim.x)
                multiply(tile == own_first, scratch + i * DecodeWarps * Rows * Channels);
            sync_workers();
            if (__any_sync(~0u, y.inside))
                finish(y);
            sync_workers();
            first += Group * gridDim.x;
            if (first * Channels >= N)
                break;
            y = results(first);
        }
    }
};

// Eight channels of a head, or fewer; whole heads of a multiple of eight are loaded at once.
template <bool Whole>
__device__ Raw load_channels(const floatX* from, int count) {
    if (!Whole) {
        Eight x;
        for (int i = 0; i < Width; i++)
            x.x[i] = i < count ? from[i] : (floatX)0.f;
        return *(Raw*)&x;
    }
    Raw x = {};
    if (count > 0)
        x = *(const Raw*)from;
    return x;
}

// What attention to some keys gives for one channel: Σ p·v and Σ p, with p = 2^(score − max).
struct Attended {
    float sum, total, max;

    __device__ Attended operator+(Attended other) const {
        float top = fmaxf(max, other.max), a = exp2_approximate(max - top), b = exp2_approximate(other.max - top);
        return {sum * a + other.sum * b, total * a + other.total * b, top};
    }
};

// Attention of the query at the position, of a head of a row, to a part of the keys. As many lanes as a key needs take
// it, eight channels each, and keep sums of their own until the end. Thread c returns what channel c gets.
template <bool Whole, bool Mails>
__device__ Attended attend_to_part(
    const Operation& op, const Decode& run, int row, int head, int part, int position, Mail in, float* scratch) {
    constexpr int Batch = 4; // keys of a lane that are loaded together
    int C = op.K, HS = C / op.heads, lanes = 1, warp = threadIdx.x / Warp, lane = threadIdx.x % Warp;
    int shift = 0; // of lanes
    for (; lanes * Width < HS; shift++)
        lanes *= 2;
    int channel = (lane & lanes - 1) * Width, own = HS - channel;
    int groups = DecodeThreads >> shift, group = threadIdx.x >> shift;
    int first_key = part * PartKeys, end = min(first_key + PartKeys, position + 1);
    const floatX* shared_head = op.x + head * HS + channel;
    floatX* this_head = (floatX*)shared_head + (int64_t)row * op.T * 3 * C;
    float *maxima = scratch, *totals = maxima + DecodeWarps, *sums = totals + DecodeWarps;
    uint4 now[6] = {}; // two words each of the query, and of its key and value
    Pack q = {}, total = {};
    float scale = rsqrtf(HS) * Log2E, max = Lowest, all = 0;
    for (int begin = first_key; begin < end; begin += Batch * groups) {
        Raw k[Batch] = {}, v[Batch] = {};
#pragma unroll
        for (int i = 0; i < Batch; i++) {
            int key = begin + i * groups + group;
            const floatX* at = (key < run.shared ? shared_head : this_head) + (int64_t)key * 3 * C + C;
            if (key < end && !(Mails && key == position)) {
                k[i] = load_channels<Whole>(at, own);
                v[i] = load_channels<Whole>(at + C, own);
            }
        }
        if (begin == first_key) { // while the keys come
            if constexpr (Mails) {
                const uint4* words = in.words + (row * 3 * C + head * HS + channel) / 4;
                in.receive(now, own > 0 ? 6 : 0, [&](int i) { return words + i / 2 * (C / 4) + i % 2; });
                q = widen(make_uint4(now[0].x, now[0].y, now[1].x, now[1].y));
            } else {
                q = widen(load_channels<Whole>(this_head + (int64_t)position * 3 * C, own));
            }
        }
        float scores[Batch], new_max = max;
#pragma unroll
        for (int i = 0; i < Batch; i++) {
            int key = begin + i * groups + group;
            if constexpr (Mails) {
                if (key == position && own > 0) { // nobody else has this key in later tokens
                    uint4* cache = (uint4*)(this_head + (int64_t)key * 3 * C + C);
                    *cache = *(uint4*)&k[i] = make_uint4(now[2].x, now[2].y, now[3].x, now[3].y);
                    cache[C / Width] = *(uint4*)&v[i] = make_uint4(now[4].x, now[4].y, now[5].x, now[5].y);
                }
            }
            float score = sum(q * widen(k[i])) * scale;
            for (int distance = lanes / 2; distance > 0; distance /= 2)
                score += __shfl_xor_sync(~0u, score, distance);
            scores[i] = key < end ? score : 2 * Lowest;
            new_max = fmaxf(new_max, scores[i]);
        }
        float keep = exp2_approximate(max - new_max);
        all *= keep;
        total = map(total, [=](float x) { return x * keep; });
#pragma unroll
        for (int i = 0; i < Batch; i++) {
            float p = exp2_approximate(scores[i] - new_max);
            all += p;
            total = total + map(widen(v[i]), [=](float x) { return x * p; });
        }
        max = new_max;
    }
    // Now the sums of all groups of lanes, and then those of all warps, each brought to the same maximum.
    float top = max;
    for (int distance = lanes; distance < Warp; distance *= 2)
        top = fmaxf(top, __shfl_xor_sync(~0u, top, distance));
    float keep = exp2_approximate(max - top);
    all *= keep;
    total = map(total, [=](float x) { return x * keep; });
    for (int distance = lanes; distance < Warp; distance *= 2) {
        all += __shfl_xor_sync(~0u, all, distance);
        total = total + map(total, [=](float x) { return __shfl_xor_sync(~0u, x, distance); });
    }
    if (lane < lanes)
        store(sums + warp * LargestHead + channel, total);
    if (lane == 0) {
        maxima[warp] = top;
        totals[warp] = all;
    }
    sync_workers();
    Attended y = {0, 0, Lowest};
    for (int i = 0; i < DecodeWarps; i++)
        y.max = fmaxf(y.max, maxima[i]);
    for (int i = 0; i < DecodeWarps && threadIdx.x < HS; i++) {
        float factor = exp2_approximate(maxima[i] - y.max);
        y.sum += sums[i * LargestHead + threadIdx.x] * factor;
        y.total += totals[i] * factor;
    }
    sync_workers();
    return y;
}

// y (rows, C) = attention of the query at the position, for x (rows, T, 3C).
template <bool Whole, bool Mails>
__device__ void attend(const Operation& op, const Decode& run, int position, Mail in, Mail out, float* scratch) {
    int C = op.K, HS = C / op.heads, heads = run.rows * op.heads, last = position / PartKeys, c = threadIdx.x;
    if constexpr (Mails) {
        // A block takes a part of a head; the one with the first part, which comes last, gets all others' results.
        uint4* parts = box_of(run, ChooseNext, 0).words + c; // (parts, rows, heads, HS)
        int items = (last + 1) * heads, own_items = (items + gridDim.x - 1 - blockIdx.x) / gridDim.x;
        for (int item = blockIdx.x + (own_items - 1) * gridDim.x; item >= 0; item -= gridDim.x) {
            int part = item / heads, row = item % heads / op.heads, head = item % op.heads;
            Attended y = attend_to_part<Whole, Mails>(op, run, row, head, part, position, in, scratch);
            if (part > 0) {
                if (c < HS)
                    store_word(parts + item * HS, make_uint4(__float_as_uint(y.sum), __float_as_uint(y.total),
                        __float_as_uint(y.max), out.time));
                continue;
            }
            for (int other = 1; other <= last && c < HS; other += 8) {
                uint4 words[8] = {};
                out.receive(words, last + 1 - other, [&](int i) { return parts + ((other + i) * heads + item) * HS; });
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (other + i <= last)
                        y = y + Attended{__uint_as_float(words[i].x), __uint_as_float(words[i].y),
                            __uint_as_float(words[i].z)};
                }
            }
            float own = y.sum / y.total;
            uint32_t two = pair(own, __shfl_down_sync(~0u, own, 1)), next_two = __shfl_down_sync(~0u, two, 2);
            if (c < HS && c % 4 == 0)
                out.send(row * C + head * HS + c, {two, next_two});
        }
    } else {
        for (int item = blockIdx.x; item < heads; item += gridDim.x) {
            int row = item / op.heads, head = item % op.heads;
            Attended y = attend_to_part<Whole, Mails>(op, run, row, head, 0, position, in, scratch);
            for (int part = 1; part <= last; part++)
                y = y + attend_to_part<Whole, Mails>(op, run, row, head, part, position, in, scratch);
            if (c < HS)
                ((floatX*)op.y)[(int64_t)row * C + head * HS + c] = y.sum / y.total;
        }
    }
}

__device__ uint64_t largest(uint64_t x, uint64_t y) { return x > y ? x : y; }

// The largest x in the block, and the sum of all.
template <typename F>
__device__ uint64_t combine_block(uint64_t x, F combine) {
    __shared__ uint64_t parts[DecodeWarps];
    for (int distance = Warp / 2; distance > 0; distance /= 2)
        x = combine(x, __shfl_xor_sync(~0u, x, distance));
    sync_workers();
    if (threadIdx.x % Warp == 0)
        parts[threadIdx.x / Warp] = x;
    sync_workers();
    x = parts[0];
    for (int i = 1; i < DecodeWarps; i++)
        x = combine(x, parts[i]);
    return x;
}
__device__ uint64_t largest_of_block(uint64_t x) { return combine_block(x, largest); }
__device__ uint64_t sum_of_block(uint64_t x) {
    return combine_block(x, [](uint64_t a, uint64_t b) { return a + b; });
}

// A float as an unsigned number that compares as it does, and back.
__device__ uint32_t ordered(float x) {
    uint32_t bits = __float_as_uint(x);
    return bits >> 31 ? ~bits : bits | 1u << 31;
}
__device__ float number(uint32_t order) { return __uint_as_float(order >> 31 ? order & ~(1u << 31) : ~order); }

// The largest threshold in [low, high] that lets weight of at least target through; so does low.
template <typename Weight>
__device__ uint32_t threshold(uint32_t low, uint32_t high, uint64_t target, Weight weight) {
    while (low < high) {
        uint32_t middle = high - (high - low) / 2;
        if (weight(middle) >= target)
            low = middle;
        else
            high = middle - 1;
    }
    return low;
}

// f of the largest of every eight logits, and of its number.
template <typename F>
__device__ void for_each_maximum(const float* maxima, int tiles, F f) {
    constexpr int Batch = 25; // loaded together; 256 threads have so many for 50257 logits
    for (int first = threadIdx.x; first < tiles; first += Batch * DecodeThreads) {
        float some[Batch];
#pragma unroll
        for (int i = 0; i < Batch; i++)
            some[i] = first + i * DecodeThreads < tiles ? maxima[first + i * DecodeThreads] : -INFINITY;
#pragma unroll
        for (int i = 0; i < Batch; i++) {
            if (first + i * DecodeThreads < tiles)
                f(some[i], first + i * DecodeThreads);
        }
    }
}

// The tokens of a row that may be chosen, in shared memory, with their logits and with their probabilities as integers,
// whose sums do not depend on order. If there are too many, the logits stand for all.
struct Candidates {
    uint64_t* weights;
    float* values;
    int *tokens, *likely; // likely has the tiles that candidates are in
    int count;
    bool listed;

    __device__ Candidates(void* scratch) : weights((uint64_t*)scratch), values((float*)(weights + MostCandidates)),
        tokens((int*)(values + MostCandidates)), likely(tokens + MostCandidates) {}

    // Lists those of V logits that are at least low, ordered; maxima has the largest of every eight.
    template <typename Weight>
    __device__ void list(const float* logits, const float* maxima, int V, uint32_t low, Weight weight_of) {
        __shared__ int hits, found;
        if (threadIdx.x == 0)
            hits = found = 0;
        sync_workers();
        for_each_maximum(maxima, (V + Channels - 1) / Channels, [&](float max, int tile) {
            int at = ordered(max) >= low ? atomicAdd(&hits, 1) : MostCandidates;
            if (at < MostCandidates)
                likely[at] = tile;
        });
        sync_workers();
        for (int i = threadIdx.x; i < min(hits, MostCandidates) * Channels; i += DecodeThreads) {
            int token = likely[i / Channels] * Channels + i % Channels;
            float logit = token < V ? logits[token] : -INFINITY;
            int at = ordered(logit) >= low ? atomicAdd(&found, 1) : MostCandidates;
            if (at < MostCandidates) {
                values[at] = logit;
                tokens[at] = token;
                weights[at] = weight_of(logit);
            }
        }
        sync_workers();
        listed = hits <= MostCandidates && found <= MostCandidates;
        count = listed ? found : V;
    }
};

// The next token of a row from its logits (V), of which maxima has the largest of every eight; V if they are not
// finite. Top-k and top-p are thresholds: a token as likely as the last one let through is let through, too.
__device__ int choose(
    const Decode& run, const float* logits, const float* maxima, int V, uint32_t seed, void* scratch) {
    int tiles = (V + Channels - 1) / Channels;
    auto entry = [](float x, int i) { return (uint64_t)ordered(x) << 32 | (uint32_t)~i; }; // of equals the first wins
    uint64_t own = 0;
    for_each_maximum(maxima, tiles, [&](float max, int tile) { own = largest(own, entry(max, tile)); });
    uint64_t best = largest_of_block(own);
    float max = number(best >> 32);
    if (!isfinite(max))
        return V;
    if (!run.selects) {
        int first = (int)~(uint32_t)best * Channels, token = first + threadIdx.x % Warp % Channels;
        return first + __ffs(__ballot_sync(~0u, token < V && logits[token] == max)) - 1;
    }
    // Candidates are above (1 − topP)/V of the likeliest token's probability, and above the k-th of the threads'
    // largest, of which the upper half of the bits will do.
    uint32_t high = best >> 32, low = ordered(max + run.temperature * logf((1 - run.top_p) / V));
    auto count_above = [&](uint32_t least) {
        uint32_t count;
        count_workers(count, own >> 48 >= least);
        return (uint64_t)count;
    };
    if (run.top_k > 0 && run.top_k <= min(tiles, DecodeThreads))
        low = ::max(low, threshold(low >> 16, high >> 16, run.top_k, count_above) << 16);
    auto weight_of = [&](float logit) { return (uint64_t)(exp2f((logit - max) / run.temperature * Log2E) * 0x1p40f); };
    auto lottery = [&](float logit, int token) { return entry(logit / run.temperature + gumbel(token, seed), token); };
    Candidates all(scratch);
    all.list(logits, maxima, V, low, weight_of);
    if (all.listed && all.count <= DecodeThreads) { // each thread counts and adds up those above its own
        bool kept = threadIdx.x < all.count;
        float x = kept ? all.values[threadIdx.x] : INFINITY;
        uint64_t weight_above = 0;
        int above = 0;
        if (__any_sync(~0u, kept)) {
#pragma unroll 4
            for (int i = 0; i < all.count; i++) {
                above += all.values[i] > x;
                weight_above += all.values[i] > x ? all.weights[i] : 0;
            }
        }
        kept = kept && (run.top_k == 0 || above < run.top_k);
        if (run.top_p < 1) {
            uint64_t target = run.top_p * (double)sum_of_block(kept ? all.weights[threadIdx.x] : 0);
            kept = kept && (above == 0 || weight_above < target);
        }
        return ~(uint32_t)largest_of_block(kept ? lottery(x, all.tokens[threadIdx.x]) : 0);
    }
    // The weight of all tokens at or above a threshold: 1 each, or their probabilities.
    const float* values = all.listed ? all.values : logits;
    auto sum_above = [&](uint32_t least, bool by_probability) {
        uint64_t own = 0;
#pragma unroll 8
        for (int i = threadIdx.x; i < all.count; i += DecodeThreads) {
            float x = values[i];
            own += ordered(x) < least ? 0 : !by_probability ? 1 : all.listed ? all.weights[i] : weight_of(x);
        }
        return sum_of_block(own);
    };
    if (run.top_k > 0)
        low = threshold(low, high, min(run.top_k, V), [&](uint32_t least) { return sum_above(least, false); });
    if (run.top_p < 1)
        low = threshold(low, high, (uint64_t)(run.top_p * (double)sum_above(low, true)),
            [&](uint32_t least) { return sum_above(least, true); });
    own = 0;
    for (int i = threadIdx.x; i < all.count; i += DecodeThreads) {
        if (ordered(values[i]) >= low)
            own = largest(own, lottery(values[i], all.listed ? all.tokens[i] : i));
    }
    return ~(uint32_t)largest_of_block(own);
}

// x (rows, C) = wte + wpe at a row's token, and the sums.
template <bool Mails>
__device__ void embed_row(const Operation& op, const Decode& run, Mail out, int row, int token, int position) {
    for (int c = threadIdx.x * Width; c < op.N; c += DecodeThreads * Width) {
        Pack kept = widen(raw(load(op.x + (int64_t)token * op.N + c) + load(op.b + (int64_t)position * op.N + c)));
        float total = sum(kept), squares = sum(kept * kept);
        if constexpr (Mails) {
            uint4 x = narrow(kept);
            out.send(row * op.N + c, {x.x, x.y}, total);
            out.send(row * op.N + c + 4, {x.z, x.w}, squares);
        } else {
            store((floatX*)op.y + row * op.N + c, kept);
            run.sums[(row * op.N + c) / Width] = make_float2(total, squares);
        }
    }
}

// Runs the program count times.
template <bool Mails>
__device__ void run_program(const Decode& run) {
    uint4* scratch = shared + run.slots * Weights::SlotBytes / 16;
    Operation* program = (Operation*)(scratch + ScratchBytes / 16);
    for (int i = threadIdx.x; i < run.length * sizeof(Operation) / 8; i += blockDim.x)
        ((uint64_t*)program)[i] = ((const uint64_t*)run.program)[i];
    floatX* staged = (floatX*)(scratch + (ScratchBytes + run.length * sizeof(Operation) + 15) / 16);
    Weights weights(run.slots);
    __syncthreads();
    if (threadIdx.x >= DecodeThreads)
        return weights.copy(program, run.length, run.count);
    Mail stream = {}, last = {};
    uint32_t time = run.time, meetings = 0;
    for (int n = 0; n < run.count; n++) {
        for (int i = 0; i < run.length; i++) {
            const Operation& op = program[i];
            int position = run.position + n, *tokens = run.tokens + n * run.rows;
            Mail in = op.norm_w ? stream : last, out = box_of(run, op.kind, ++time);
            if (op.kind == EmbedNext) {
                for (int row = blockIdx.x; row < run.rows; row += gridDim.x)
                    embed_row<Mails>(op, run, out, row, tokens[row], position);
            } else if (op.kind == ChooseNext) {
                int tiles = (op.K + Channels - 1) / Channels;
                for (int row = blockIdx.x; row < run.rows; row += gridDim.x) {
                    int token = choose(run, (const float*)op.x + (int64_t)row * op.K, run.maxima + row * tiles, op.K,
                        seed_of(run, row, n), scratch);
                    if (threadIdx.x == 0)
                        tokens[run.rows + row] = token;
                    sync_workers();
                }
                continue; // the block that has chosen a token embeds it
            } else if (op.kind == AttentionNext) {
                if (Mails || op.K / op.heads % Width == 0)
                    attend<true, Mails>(op, run, position, in, out, (float*)scratch);
                else
                    attend<false, Mails>(op, run, position, in, out, (float*)scratch);
            } else {
                if (!Mails && op.norm_w) {
                    normalize_rows(op, run, (float2*)scratch);
                    meet(run.arrivals, ++meetings);
                }
                Product<Mails> product = {op, run, n, (int)threadIdx.x / Warp, (int)threadIdx.x % Warp, op.N, op.K,
                    (op.K + Slice - 1) / Slice * Pieces, in, stream, out, weights, (float*)scratch, staged,
                    op.norm_w ? run.normed : op.x};
                product.compute();
            }
            if (!Mails || op.kind == LogitsNext)
                meet(run.arrivals, ++meetings, !Mails || blockIdx.x < run.rows);
            last = out;
            stream = op.kind == EmbedNext || op.kind == ResidualNext ? out : stream;
        }
    }
}

#ifndef FP32
// For up to 8 sequences, if channels of heads are a multiple of 8.
KERNEL __launch_bounds__(DecodeThreads + Warp, 1) decode(Decode run) { run_program<true>(run); }
#endif
KERNEL __launch_bounds__(DecodeThreads + Warp, 1) decode_many(Decode run) { run_program<false>(run); }
