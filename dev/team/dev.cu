#ifdef STAMPS
__device__ unsigned gStamps[128];
#define STAMP(i) do { if (threadIdx.x == 0) reinterpret_cast<unsigned*>(trocr::greedy::teamShared)[192 + (i)] = static_cast<unsigned>(clock64()) | 1u; } while (0)
#define STAMPS_INIT() do { if (threadIdx.x < 64) reinterpret_cast<unsigned*>(trocr::greedy::teamShared)[192 + threadIdx.x] = 0; } while (0)
#define STAMPS_END() do { if (threadIdx.x == 0 && (blockIdx.x == 0 || blockIdx.x == gridDim.x - 1)) { for (int i_ = 0; i_ < 62; ++i_) gStamps[(blockIdx.x != 0) * 64 + i_] = reinterpret_cast<unsigned*>(trocr::greedy::teamShared)[192 + i_]; gStamps[62] = 1; } } while (0)
#else
#define STAMP(i)
#define STAMPS_INIT()
#define STAMPS_END()
#endif
#include "greedy_decoder/team_sm90.cu"
#ifdef STAMPS
extern "C" void readStamps(unsigned* out) { cudaMemcpyFromSymbol(out, gStamps, sizeof(gStamps)); }
#elif !defined(OLD)
extern "C" void readStamps(unsigned* out) { out[62] = 0; }
#endif
