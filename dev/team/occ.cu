#include <cstdio>
__global__ void __launch_bounds__(640,1) k(int* p){ extern __shared__ int s[]; p[threadIdx.x]=s[threadIdx.x]; }
int main(){ cudaFuncSetAttribute(k,cudaFuncAttributeMaxDynamicSharedMemorySize,220*1024); cudaFuncSetAttribute(k,cudaFuncAttributeNonPortableClusterSizeAllowed,1);
 for(int c:{2,4,5,6,7,8,9,10,12,14,16}){ cudaLaunchConfig_t cfg{}; cudaLaunchAttribute a{}; a.id=cudaLaunchAttributeClusterDimension; a.val.clusterDim.x=c;a.val.clusterDim.y=a.val.clusterDim.z=1; cfg.gridDim=c; cfg.blockDim=640; cfg.dynamicSmemBytes=220*1024; cfg.attrs=&a; cfg.numAttrs=1; int n=-1; cudaError_t e=cudaOccupancyMaxActiveClusters(&n,k,&cfg); printf("cluster %d: %d %s\n",c,n,e?cudaGetErrorString(e):""); cudaGetLastError(); }
 cudaDeviceProp p; cudaGetDeviceProperties(&p,0); printf("%s %d SMs L2 %d\n",p.name,p.multiProcessorCount,p.l2CacheSize); int ck; cudaDeviceGetAttribute(&ck,cudaDevAttrClockRate,0); printf("clock %d\n",ck);}
