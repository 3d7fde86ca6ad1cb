#[=======================================================================[.rst:
FindTensorRT
------------

Finds TensorRT's headers, and its library where it is installed. The two are looked for apart, since the Python package
``tensorrt`` brings libraries without headers.

Looked at, in this order, for each:

* ``TensorRT_INCLUDE_DIR`` and ``TensorRT_LIBRARY`` (cache), which decide;
* ``TENSORRT_ROOT`` (cache variable, then environment variable): ``include`` and ``lib``;
* ``.deps/tensorrt`` of this project, where ``scripts/get_tensorrt.py`` puts it;
* for the library: the Python package ``tensorrt_libs`` in ``TROCR_SITE_PACKAGES``;
* system paths: NVIDIA's packages, ``/usr/local/tensorrt``, ``/opt/tensorrt``.

Targets: ``TensorRT::headers``; ``TensorRT::nvinfer`` where the library was found.
Variables: ``TensorRT_FOUND``, ``TensorRT_VERSION`` (of the headers), ``TensorRT_INCLUDE_DIR``, ``TensorRT_LIBRARY``.
#]=======================================================================]

set(_roots "")
if(TENSORRT_ROOT)
    list(APPEND _roots ${TENSORRT_ROOT})
endif()
if(DEFINED ENV{TENSORRT_ROOT})
    list(APPEND _roots $ENV{TENSORRT_ROOT})
endif()
list(APPEND _roots ${CMAKE_SOURCE_DIR}/.deps/tensorrt)
set(_system /usr /usr/local /usr/local/tensorrt /opt/tensorrt)
set(_python_libs "")
if(TROCR_SITE_PACKAGES)
    set(_python_libs ${TROCR_SITE_PACKAGES}/tensorrt_libs)
endif()

find_path(TensorRT_INCLUDE_DIR NvInfer.h
    HINTS ${_roots} PATHS ${_system}
    PATH_SUFFIXES include include/${CMAKE_LIBRARY_ARCHITECTURE} include/x86_64-linux-gnu
    DOC "Folder of TensorRT's NvInfer.h")

# Libraries installed without the development package have their version as only suffix.
set(_names nvinfer libnvinfer.so.11 libnvinfer.so.10)
find_library(TensorRT_LIBRARY NAMES ${_names} NAMES_PER_DIR
    HINTS ${_roots} ${_python_libs} PATHS ${_system}
    PATH_SUFFIXES lib lib/${CMAKE_LIBRARY_ARCHITECTURE} lib/x86_64-linux-gnu lib64
    DOC "TensorRT's libnvinfer")

set(TensorRT_VERSION "")
if(TensorRT_INCLUDE_DIR AND EXISTS ${TensorRT_INCLUDE_DIR}/NvInferVersion.h)
    # Up to 10.x `#define NV_TENSORRT_MAJOR 10`; later headers define it as TRT_MAJOR_ENTERPRISE, a number.
    file(STRINGS ${TensorRT_INCLUDE_DIR}/NvInferVersion.h _lines
         REGEX "^#define (NV_TENSORRT|TRT)_(MAJOR|MINOR|PATCH)(_ENTERPRISE)? +[0-9]+")
    foreach(_part MAJOR MINOR PATCH)
        foreach(_line IN LISTS _lines)
            if(_line MATCHES "_${_part}(_ENTERPRISE)? +([0-9]+)")
                list(APPEND TensorRT_VERSION ${CMAKE_MATCH_2})
                break()
            endif()
        endforeach()
    endforeach()
    list(JOIN TensorRT_VERSION "." TensorRT_VERSION)
endif()

list(JOIN _system ", " _system_text)
string(JOIN "\n    " _looked
    "TensorRT_INCLUDE_DIR: ${TensorRT_INCLUDE_DIR}"
    "TENSORRT_ROOT of CMake: ${TENSORRT_ROOT}"
    "TENSORRT_ROOT of the environment: $ENV{TENSORRT_ROOT}"
    "the project: ${CMAKE_SOURCE_DIR}/.deps/tensorrt/include"
    "system: ${_system_text}, in include and include/${CMAKE_LIBRARY_ARCHITECTURE}")
include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(TensorRT
    REQUIRED_VARS TensorRT_INCLUDE_DIR
    VERSION_VAR TensorRT_VERSION
    REASON_FAILURE_MESSAGE
    "\nLooked for NvInfer.h in\n    ${_looked}\nRemedy: `python scripts/get_tensorrt.py` fetches what is missing into \
.deps/tensorrt, or give -DTENSORRT_ROOT=DIR where DIR/include/NvInfer.h is. The Python package tensorrt has no headers. \
-DTROCR_PLUGINS=OFF builds without TensorRT.\n")

if(TensorRT_FOUND)
    message(STATUS "TensorRT headers ${TensorRT_VERSION}: ${TensorRT_INCLUDE_DIR}; library: ${TensorRT_LIBRARY}")
    if(NOT TARGET TensorRT::headers)
        add_library(TensorRT::headers INTERFACE IMPORTED)
        set_target_properties(TensorRT::headers PROPERTIES
            INTERFACE_INCLUDE_DIRECTORIES ${TensorRT_INCLUDE_DIR}
            INTERFACE_SYSTEM_INCLUDE_DIRECTORIES ${TensorRT_INCLUDE_DIR})
    endif()
    if(TensorRT_LIBRARY AND NOT TARGET TensorRT::nvinfer)
        add_library(TensorRT::nvinfer UNKNOWN IMPORTED)
        set_target_properties(TensorRT::nvinfer PROPERTIES
            IMPORTED_LOCATION ${TensorRT_LIBRARY}
            INTERFACE_LINK_LIBRARIES TensorRT::headers)
    endif()
endif()
mark_as_advanced(TensorRT_INCLUDE_DIR TensorRT_LIBRARY)
foreach(_name roots system system_text python_libs names lines looked part line)
    unset(_${_name})
endforeach()
