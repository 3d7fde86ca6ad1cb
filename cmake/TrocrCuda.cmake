# Chooses nvcc and the architectures to compile for, before CMake's own enable_language(CUDA).

# -DCMAKE_CUDA_COMPILER or CUDACXX decide. Else the first of these; scripts/get_cuda.py looks in the same order.
if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
    find_program(trocr_nvcc nvcc NO_CACHE PATHS ENV CUDA_HOME ENV CUDA_PATH /usr/local/cuda PATH_SUFFIXES bin)
    if(NOT trocr_nvcc)
        file(GLOB trocr_nvcc_wheels ${TROCR_SITE_PACKAGES}/nvidia/cu*/bin)
        find_program(trocr_nvcc nvcc NO_CACHE PATHS ${trocr_nvcc_wheels} NO_DEFAULT_PATH)
        cmake_path(SET trocr_nvcc_root NORMALIZE "${trocr_nvcc}/../..")
        if(trocr_nvcc AND NOT EXISTS ${trocr_nvcc_root}/lib64)
            message(FATAL_ERROR
                "${trocr_nvcc} is not complete: PyPI's packages leave out the links lib64 and lib/libcudart.so. "
                "Remedy: `${Python_EXECUTABLE} scripts/get_cuda.py` adds them.")
        endif()
    endif()
    if(NOT trocr_nvcc)
        message(FATAL_ERROR
            "nvcc not found. Looked for: CUDACXX and CMAKE_CUDA_COMPILER (not set), nvcc on the PATH, "
            "CUDA_HOME, CUDA_PATH, /usr/local/cuda, ${TROCR_SITE_PACKAGES}/nvidia/cu*/bin. "
            "Remedy: `${Python_EXECUTABLE} scripts/get_cuda.py` installs it from PyPI, or set CUDACXX.")
    endif()
    set(CMAKE_CUDA_COMPILER ${trocr_nvcc} CACHE FILEPATH "CUDA compiler")
endif()

# Real code for each, and PTX of the newest for GPUs to come. Hopper's own instructions need 90a.
set(trocr_all_archs 80-real 86-real 89-real 90a-real 120)
if(TROCR_ALL_ARCHS)
    set(CMAKE_CUDA_ARCHITECTURES ${trocr_all_archs} CACHE STRING "GPU architectures to compile for" FORCE)
elseif(NOT CMAKE_CUDA_ARCHITECTURES AND NOT DEFINED ENV{CUDAARCHS})
    # CMake's "native" would give 90 for Hopper, without its own instructions.
    execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE capabilities RESULT_VARIABLE status ERROR_QUIET)
    string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
    list(REMOVE_DUPLICATES capabilities)
    if(NOT status EQUAL 0 OR NOT capabilities)
        set(capabilities 9.0) # no GPU here: one architecture, to build fast
    endif()
    list(TRANSFORM capabilities REPLACE "\\." "")
    list(TRANSFORM capabilities REPLACE "^90$" "90a")
    list(TRANSFORM capabilities APPEND "-real")
    set(CMAKE_CUDA_ARCHITECTURES ${capabilities} CACHE STRING "GPU architectures to compile for")
endif()
message(STATUS "CUDA architectures: ${CMAKE_CUDA_ARCHITECTURES}")
