# Decides whether CUDA code is built: sets FLASHDELTA_WITH_CUDA, and enables the language where it is.
#
# nvcc is looked for in CUDACXX, CMAKE_CUDA_COMPILER, CUDA_HOME, CUDA_PATH, PATH and /usr/local/cuda. A toolkit from the nvidia-cuda-*
# Python packages serves as well (tools/cuda_toolkit.py prepares it and prints its nvcc).
set(FLASHDELTA_WITH_CUDA OFF)
if(NOT FLASHDELTA_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "FLASHDELTA_CUDA is ${FLASHDELTA_CUDA}; allowed are AUTO, ON and OFF")
endif()
if(FLASHDELTA_CUDA STREQUAL "OFF" OR (FLASHDELTA_CUDA STREQUAL "AUTO" AND (CMAKE_CROSSCOMPILING OR FLASHDELTA_SANITIZE)))
  return()
endif()

if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX})
  find_program(FLASHDELTA_NVCC nvcc HINTS $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin PATHS /usr/local/cuda/bin)
  if(FLASHDELTA_NVCC)
    set(CMAKE_CUDA_COMPILER ${FLASHDELTA_NVCC})
  endif()
endif()
# Architectures are passed as -gencode below: older CMakes do not know the "a" targets, and their default is one nvcc 13 dropped.
set(CMAKE_CUDA_ARCHITECTURES OFF)

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(FLASHDELTA_CUDA STREQUAL "ON")
    message(FATAL_ERROR "FLASHDELTA_CUDA is ON but no working nvcc was found: put it on PATH, or set CUDACXX or CUDA_HOME "
                        "(./run test with FLASHDELTA_CUDA=ON installs one from Python packages)")
  endif()
  message(STATUS "CUDA kernels: off (no nvcc)")
  return()
endif()
enable_language(CUDA)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
  # Not every CMake we allow knows how nvcc is asked for C++20; nvcc itself has known since 12.0.
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
  set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION -std=c++20)
  list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
endif()
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
# The static runtime finds the driver at run time, so that the library loads where there is none.
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
foreach(architecture IN LISTS FLASHDELTA_CUDA_ARCHITECTURES)
  string(APPEND CMAKE_CUDA_FLAGS " -gencode=arch=compute_${architecture},code=sm_${architecture}")
endforeach()
string(APPEND CMAKE_CUDA_FLAGS " -Xcompiler=-Wall,-Wextra --expt-relaxed-constexpr")
set(FLASHDELTA_WITH_CUDA ON)
message(STATUS "CUDA kernels: on, ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}, sm_${FLASHDELTA_CUDA_ARCHITECTURES}")
